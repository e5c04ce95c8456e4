"""`p828 generate`: continue prompts with a trained model."""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from p828.cli.flags import parse
from p828.cli.output import show
from p828.config.rules import check_text
from p828.errors import ConfigError, DataError, warn
from p828.inference.generate import Completion, generate
from p828.inference.load import LoadedModel, load_model
from p828.inference.sampling import SamplingConfig
from p828.train.console import waiting

USAGE = "p828 generate CHECKPOINT --prompt TEXT [--prompt TEXT ...] [--interactive] [--temperature T ...]"
DESCRIPTION = f"{USAGE}\n\nOne prompt's text is shown as it is generated; several are continued together."


@dataclass(frozen=True, kw_only=True)
class Arguments(SamplingConfig):
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; an empty one begins a document."""
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
    check_text("CHECKPOINT", given.checkpoint)
    with waiting("loading the model", warn):
        loaded = load_model(given.checkpoint, given.device)
    if len(given.prompt) == 1:
        _stream(loaded, given.prompt[0], given)
    elif given.prompt:
        _print_all(loaded, given.prompt, given)
    if given.interactive:
        _converse(loaded, given)


def _stream(loaded: LoadedModel, prompt: str, sampling: SamplingConfig) -> None:
    (completion,) = generate(
        loaded.model, loaded.tokenizer, [prompt], sampling, on_text=lambda _, text: show(text), dtype=loaded.dtype
    )
    show("", end="\n")
    _note(loaded, completion)


def _print_all(loaded: LoadedModel, prompts: tuple[str, ...], sampling: SamplingConfig) -> None:
    completions = generate(loaded.model, loaded.tokenizer, prompts, sampling, dtype=loaded.dtype)
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
        show(f"--- {number}: {prompt}", end="\n")
        show(completion.text, end="\n")
        _note(loaded, completion)


def _converse(loaded: LoadedModel, sampling: SamplingConfig) -> None:
    while True:
        if sys.stdin.isatty():
            show("> ")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the input is not {error.encoding} text") from None
        if not line:
            return
        try:
            _stream(loaded, line.removesuffix("\n"), sampling)
        except (ConfigError, DataError) as error:
            warn(str(error))


def _note(loaded: LoadedModel, completion: Completion) -> None:
    if completion.finish_reason == "context":
        context = loaded.config.model.max_position_embeddings
        warn(f"ended there: the model's context of {context} tokens is full")
