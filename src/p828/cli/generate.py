"""`p828 generate`: continue prompts with a trained model, or answer messages."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from p828.cli.flags import parse, shown_word
from p828.cli.output import show
from p828.config.rules import check_path
from p828.data.tokenizer.chat_template import Messages
from p828.errors import ConfigError, DataError, warn
from p828.inference.answer import answer
from p828.inference.generate import Completion, OnText, generate
from p828.inference.load import LoadedModel, load_model
from p828.inference.sampling import SamplingConfig
from p828.train.log.console import waiting

USAGE = "p828 generate CHECKPOINT --prompt TEXT [--prompt TEXT ...] [--chat] [--interactive] [--temperature T ...]"
DESCRIPTION = (
    f"{USAGE}\n\nOne prompt's text is shown as it is generated; several are continued together. With --chat, which "
    "needs a run that was trained on conversations, each prompt is a user's message, and what is shown the answer."
)


@dataclass(frozen=True, kw_only=True)
class Arguments(SamplingConfig):
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; an empty one begins a document."""
    chat: bool = False
    """Answer each prompt as a user's message, and with --interactive what you type as one conversation."""
    system: str = ""
    """With --chat, a system message before the user's."""
    interactive: bool = False
    """Continue the lines that you type, until the end of input (Ctrl-D)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that ends the continuation, and is cut off."""


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 generate", description=DESCRIPTION)
    if not given.prompt and not given.interactive:
        raise ConfigError("nothing to continue: give --prompt TEXT or --interactive")
    if given.system and not given.chat:
        raise ConfigError(f"--system {shown_word(given.system)}: accepted with --chat")
    check_path("CHECKPOINT", given.checkpoint)
    with waiting("loading the model", warn):
        loaded = load_model(given.checkpoint, given.device)
    if given.chat and loaded.tokenizer.template is None:
        raise ConfigError(f"--chat: {loaded.path} has no chat template: it was not trained on conversations")
    if not given.chat and loaded.tokenizer.template is not None and loaded.config.data.has_conversations:
        warn("trained on conversations: --chat asks it, and here its text is continued")
    if len(given.prompt) == 1:
        _stream(loaded, given.prompt[0], given)
    elif given.prompt:
        _print_all(loaded, given.prompt, given)
    if given.interactive:
        _converse(loaded, given)


def _continuations(
    loaded: LoadedModel,
    prompts: Sequence[str],
    given: Arguments,
    history: Messages,
    on_text: OnText = lambda index, text: None,
) -> list[Completion]:
    if not given.chat:
        return generate(loaded.model, loaded.tokenizer, prompts, given, on_text, loaded.dtype)
    system: Messages = [{"role": "system", "content": given.system}] if given.system else []
    conversations = [[*system, *history, {"role": "user", "content": prompt}] for prompt in prompts]
    return answer(loaded.model, loaded.tokenizer, conversations, given, on_text, loaded.dtype)


def _stream(loaded: LoadedModel, prompt: str, given: Arguments, history: Messages | None = None) -> Completion:
    """`history` are the messages of a conversation before the prompt."""
    (completion,) = _continuations(loaded, [prompt], given, history or [], on_text=lambda _, text: show(text))
    show("", end="\n")
    _note(loaded, completion)
    return completion


def _print_all(loaded: LoadedModel, prompts: tuple[str, ...], given: Arguments) -> None:
    completions = _continuations(loaded, prompts, given, history=[])
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
        show(f"--- {number}: {prompt}", end="\n")
        show(completion.text, end="\n")
        _note(loaded, completion)


def _converse(loaded: LoadedModel, given: Arguments) -> None:
    history: Messages = []
    while True:
        if sys.stdin.isatty():
            show("> ")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the input is not {error.encoding} text") from None
        if not line:
            return
        prompt = line.removesuffix("\n")
        try:
            completion = _stream(loaded, prompt, given, history)
        except (ConfigError, DataError) as error:
            warn(str(error))
        else:
            history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.text}]


def _note(loaded: LoadedModel, completion: Completion) -> None:
    if completion.finish_reason == "context":
        context = loaded.config.model.max_position_embeddings
        warn(f"ended there: the model's context of {context} tokens is full")
