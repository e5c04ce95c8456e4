"""Prompts as a user gives them: texts to continue, or messages to answer, also from a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p828.config.strict_json import strict_json
from p828.data.text.conversation import messages_of
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError, DataError, did_you_mean, reason
from p828.files import read_limited
from p828.inference.answer import question
from p828.inference.generate import check_length, encode

MOST_BYTES = 2**30  # of a file of prompts
JSON_LINES = ".jsonl"
KINDS = ("prompt", "messages")
RESULTS = ("text", "finish_reason", "tokens")
"""What a line of the output holds beside what the line of the prompt held."""


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt with its place."""

    fields: dict[str, Any]
    """`prompt`, a text, or `messages`; of a JSON line what else it holds, too."""
    where: str = ""
    """The file and the line in it; empty for one of the command line."""

    @property
    def has_messages(self) -> bool:
        return "messages" in self.fields

    @property
    def shown(self) -> str:
        """The text, or what the last message says."""
        return str(self.fields["messages"][-1]["content"] if self.has_messages else self.fields["prompt"])

    def encoded(self, tokenizer: Tokenizer, context: int | None, is_chat: bool, system: str) -> tuple[str, list[int]]:
        """The text to continue and its tokens: of messages, as the chat template writes them.

        With `is_chat` a text is a user's message. A `system` message comes before the others. Raises ConfigError, with
        the place, for a prompt that fills the `context` (in tokens), that is no valid Unicode, or that the template
        refuses.
        """
        try:
            if is_chat or self.has_messages:
                text, ids = question(tokenizer, self._conversation(system))
            else:
                text, ids = self.fields["prompt"], encode(tokenizer, self.fields["prompt"])
            if context is not None:
                check_length(ids, context)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{self.where}: {error}" if self.where else str(error)) from None
        return text, ids

    def _conversation(self, system: str) -> list[dict[str, Any]]:
        own = self.fields.get("messages") or [{"role": "user", "content": self.fields["prompt"]}]
        if system and own[0]["role"] == "system":
            raise ConfigError("it begins with a system message, and --system gives another: one is accepted")
        return [{"role": "system", "content": system}, *own] if system else own


def read_prompts(path: Path) -> list[GivenPrompt]:
    """The prompts of a text file, one a line, or of a .jsonl file, with `prompt` or `messages` in each line.

    Raises ConfigError for a file that cannot be read, and DataError, naming the line, for what is in it.
    """
    if path.suffix.lower() in (".json", ".csv", ".parquet", ".gz", ".zst", ".xz"):
        raise ConfigError(f"--prompts {path}: a text file with a prompt a line, or a {JSON_LINES} file, is accepted")
    try:
        content = read_limited(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read: {reason(error)}") from None
    lines = list(_lines(content, path))
    if path.suffix.lower() == JSON_LINES:
        prompts = [_parsed(line, where) for line, where in lines if line.strip()]
    else:
        prompts = [GivenPrompt({"prompt": line}, where) for line, where in lines]
    if not prompts:
        raise DataError(f"{path}: holds no prompt")
    return prompts


def check_one_kind(prompts: Sequence[GivenPrompt]) -> None:
    """Raises DataError where some are texts to continue and others messages."""
    first = prompts[0]
    for prompt in prompts:
        if prompt.has_messages != first.has_messages:
            raise DataError(
                f"{prompt.where or 'a --prompt'} has {KINDS[prompt.has_messages]}, where "
                f"{first.where or 'a --prompt'} has {KINDS[first.has_messages]}: one kind is accepted, or with --chat "
                "both, as messages"
            )


def _lines(content: bytes, path: Path) -> Iterator[tuple[str, str]]:
    """Each line and its place. Raises DataError for one that is not UTF-8."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            yield line.removesuffix(b"\r").decode(), where
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8 text") from None


def _parsed(line: str, where: str) -> GivenPrompt:
    """A JSON line. Raises DataError."""
    try:
        fields = strict_json(line)
    except RecursionError:
        raise DataError(f"{where}: no JSON: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON object with prompt or messages is accepted, not {line.strip()[:40]}")
    found = [kind for kind in KINDS if kind in fields]
    if len(found) != 1:
        what = "both prompt and messages" if found else "neither prompt nor messages"
        near = "." if found else next((did_you_mean(key, KINDS) for key in fields), ".")
        raise DataError(f"{where}: has {what}: one of them is accepted{near}")
    for name in RESULTS:
        if name in fields:
            raise DataError(f"{where}: has {name!r}, which the output has of its own: another name is accepted")
    if found == ["prompt"] and not isinstance(fields["prompt"], str):
        raise DataError(f"{where}: prompt is {json.dumps(fields['prompt'])[:40]}: a text is accepted")
    if found == ["messages"]:
        try:
            fields["messages"] = messages_of(fields["messages"], "messages")
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
    return GivenPrompt(fields, where)
