"""The errors that are shown without a traceback, how they are shown, and a suggestion for their messages.

An error's class says whether something was at work, and so what is kept and the exit code. What is wrong with a flag, a
key or a file's name is known before anything begins: `ConfigError`. Content is read before and during the work:
`DataError` is for both, and whoever is at work makes a `RunFailed` of it.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code after Ctrl-C, 128 + SIGINT, as shells report it


class P828Error(Exception):
    """What all of them have in common: the message is for the user, in one line or two."""

    exit_code = 1
    """Of the command that ends with it."""
    is_everywhere = False
    """Whether all ranks of a run end with this very error, so that one of them need show it."""


class ConfigError(P828Error, ValueError):
    """Wrong input, before anything has begun; the message names the key or file, what was given, what is accepted.

    Raised by whoever reads flags, keys and files of settings, opens a directory, or looks for the named files. What
    this start made is removed again, if it holds nothing. Exit code 2.
    """

    exit_code = 2


class LocalRankError(ConfigError):
    """What only one of the ranks on a machine may see, before they know of each other."""


class DataError(P828Error):
    """Content that is wrong: text, tokens, a checkpoint, a model. The message names the file, and the place in it.

    Raised by whoever reads it, before anything has begun or at work. Before, it is wrong input like a ConfigError: exit
    code 2. `Trainer.run` and `data.tokens.directory.failures_at_work` make a RunFailed of one that is met at work.
    """

    exit_code = 2


class NotFinite(DataError):
    """A model whose logits are no finite numbers."""


class RunFailed(P828Error):
    """Work that has begun and cannot go on: a run, a preparation, a measurement. Exit code 1.

    Raised by whoever is at work. All that was made is kept, and what can be saved is saved.
    """


class TransientReadError(RunFailed):
    """A file or the hub that cannot be read, for now: the same command goes on when it can be read.

    Raised by whoever reads, also before anything has begun: then what this start made is removed again.
    """


class RecordsFailed(RunFailed):
    """Records or a log that cannot be written any more: the run saves a checkpoint and ends."""


class RunStopped(P828Error):
    """A run that its own guard ended (at the limit of rollbacks), or a preparation that was asked to end.

    All that was made is kept. Exit code 1.
    """


class RunPaused(P828Error):
    """A run that ended, saved, because it was asked to. Exit code 0."""

    exit_code = 0


@contextmanager
def closed_after(close: Callable[[], object]) -> Iterator[None]:
    """Call `close` after the block. If both fail, the block's error is raised and the other one is printed."""
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


def reason(error: Exception) -> str:
    """What an error says, but of a file system's neither the number nor the file, which the message begins with."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """`; did you mean X?`, or just a full stop when no accepted word is near."""
    close = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."
