"""A chat template from elsewhere tried out in a process of its own: it is a program, and may run without end."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from p828.data.tokenizer.chat_template import ChatTemplate
from p828.data.tokenizer.trial import run_apart
from p828.errors import ConfigError

SECONDS = 15.0  # fifty times what those in use take


def tried(source: str, variables: Mapping[str, str], special_tokens: Sequence[str], where: str) -> ChatTemplate:
    """The template, once it has been compiled and has written two messages elsewhere.

    Raises ConfigError in a line if that takes too long or breaks the process, and for what is no template.
    """
    try:
        done = run_apart(__name__, json.dumps([source, dict(variables), list(special_tokens), where]), SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{where}: not usable as a chat template: writing two messages took over {SECONDS:.0f} s"
        ) from None
    if done.returncode:
        raise ConfigError(f"{where}: not usable as a chat template: trying it out ended with {done.returncode}")
    return ChatTemplate(source, variables, special_tokens, where)


def main() -> None:
    """Make the template that comes on standard input. What is no template is for the caller to say."""
    with contextlib.suppress(ConfigError):
        ChatTemplate(*json.load(sys.stdin))
