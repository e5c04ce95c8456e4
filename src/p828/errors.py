"""The errors that are shown without a traceback, how they are shown, and a suggestion for their messages."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """Wrong input: the message names the key or file, what was given and what is accepted."""

    is_everywhere = False
    """Whether all ranks of a run end with this very error, so that one of them need show it."""


class LocalRankError(ConfigError):
    """What only one of the ranks on a machine may see, before they know of each other."""


class NotFinite(ConfigError):
    """A model whose logits are no finite numbers."""


class RunStopped(Exception):
    """A run that ended by its own guard (three non-finite steps, say): shown as one line, exit code 1."""

    is_everywhere = False
    """As of a ConfigError."""


class RunPaused(Exception):
    """A run that ended, saved, because it was asked to: shown as one line, exit code 0."""

    is_everywhere = False
    """As of a ConfigError."""


class TransientReadError(RunStopped):
    """A file or the hub that cannot be read, for now: the run can be resumed when it can."""


class RecordsFailed(ConfigError):
    """Records or a log that cannot be written; a run at work makes a RunStopped of it."""


@contextmanager
def closed_after(close: Callable[[], object]) -> Iterator[None]:
    """Call `close` after the block. If both fail, the block's error is raised and the other one is told in a line."""
    try:
        yield
    except BaseException:
        try:
            close()
        except Exception as error:
            print(f"and then, in closing: {type(error).__name__}: {error}", file=sys.stderr)
        raise
    close()


def warn(text: str) -> None:
    """Print a line beside a command's own output, on standard error."""
    print(f"p828: {text}", file=sys.stderr, flush=True)


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """`; did you mean X?`, or just a full stop when no accepted word is near."""
    close = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."
