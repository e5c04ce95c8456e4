"""What `p828 generate` does once its flags are read: load the model, continue the prompts, and what is typed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from p828.cli.flags import shown_word
from p828.cli.generation.arguments import Arguments
from p828.cli.generation.asking import Asking
from p828.cli.generation.completions import Printed, Written, complete
from p828.cli.generation.interactive import converse
from p828.errors import ConfigError, warn
from p828.inference.completions_file import CompletionsFile, open_completions
from p828.inference.load import load_model
from p828.inference.prompts import GivenPrompt, check_one_kind, read_prompts
from p828.inference.sampling_config import SamplingConfig
from p828.model.backend import decode_dtype
from p828.train.log.console import waiting


def generate(given: Arguments) -> None:
    """Raises ConfigError and DataError for what is given, and for a checkpoint that cannot be read."""
    prompts = _prompts(given)
    asks_messages = bool(prompts) and prompts[0].has_messages
    if given.system and not (given.chat or asks_messages):
        raise ConfigError(f"--system {shown_word(given.system)}: accepted with --chat, or with messages in --prompts")
    with waiting("loading the model", warn):
        loaded = load_model(given.checkpoint, given.device)
    is_chat, has_template = given.chat or asks_messages, loaded.tokenizer.template is not None
    if is_chat and not has_template:
        what = "--chat" if given.chat else f"--prompts {given.prompts} (messages)"
        raise ConfigError(f"{what}: {loaded.path} has no chat template: it was not trained on conversations")
    if not is_chat and has_template and loaded.config.data.has_conversations:
        warn("trained on conversations: --chat asks it, and here its text is continued")
    asking = Asking(loaded, given, is_chat, given.system, given.experts)
    if prompts:
        _continue(asking, prompts, given)
    if given.interactive:
        converse(asking)


def _prompts(given: Arguments) -> list[GivenPrompt]:
    """Those of the command line, then those of the file. Raises ConfigError and DataError."""
    prompts = [GivenPrompt({"prompt": prompt}) for prompt in given.prompt]
    if given.prompts:
        prompts += read_prompts(Path(given.prompts))
    if prompts and not given.chat:
        check_one_kind(prompts)
    return prompts


def _continue(asking: Asking, prompts: Sequence[GivenPrompt], given: Arguments) -> None:
    with waiting("tokenizing the prompts", warn):
        encoded = [asking.encoded(prompt) for prompt in prompts]
    if not given.output:
        complete(asking, encoded, Printed(prompts, asking.note))
        return
    path = Path(given.output)
    with open_completions(path, _settings(asking, prompts, given), len(prompts)) as file, _kept(file, len(prompts)):
        if file.done:
            experts = ", whose experts are not shown" if given.experts else ""
            warn(f"{file.done:,} of {len(prompts):,} prompts are done from before{experts}")
        if file.done < len(prompts):
            complete(asking, encoded[file.done :], Written(prompts, file))
    print(f"{len(prompts):,} completion{'' if len(prompts) == 1 else 's'} in {path}", flush=True)


def _settings(asking: Asking, prompts: Sequence[GivenPrompt], given: Arguments) -> dict[str, Any]:
    """What decides the completions, as JSON: a file that was begun with other settings does not go on."""
    content = json.dumps([prompt.fields for prompt in prompts]).encode()
    dtype = decode_dtype(asking.loaded.model.head_weight.device, asking.loaded.dtype)
    return {
        "checkpoint": str(asking.loaded.path),
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": hashlib.blake2b(content, digest_size=16).hexdigest(),
        "chat": asking.is_chat,
        "system": asking.system,
        **{own.name: getattr(given, own.name) for own in fields(SamplingConfig) if own.name != "slide"},
        **({"slide": True} if given.slide else {}),  # so that what was begun before there was such a flag goes on
        "stop": list(given.stop),
    }


@contextmanager
def _kept(file: CompletionsFile, total: int) -> Iterator[None]:
    """Say what is kept, where the block does not end."""
    try:
        yield
    except BaseException:
        if file.done:
            warn(f"{file.done:,} of {total:,} completions are kept in {file.directory}: the same command goes on")
        raise
