"""A directory that data is prepared into: who may, with what settings and which tokenizer."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p828.config import Config
from p828.config.values import shown
from p828.data.tokenizer.of_run import load_tokenizer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.format import (
    LARGEST_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    check_seal,
    check_tokenizer,
    open_manifest,
)
from p828.data.tokens.settings import check_settings, settings, with_paths_of
from p828.errors import ConfigError, DataError, RunFailed
from p828.files import LOCK_FILE, locked, open_appended, read_limited

PROGRESS_FILE, HASHES_FILE = "progress.json", "hashes.partial"
PROGRESS_TYPES = {
    "settings": dict, "tokenizer": str, "reader": int, "position": dict, "counts": list, "tokens": int, "hashes": dict,
    "training": dict, "validation": dict,
}  # fmt: skip
PARTIAL = re.compile(r"(training|validation)-(\d{5,}\.(tokens|documents)|waiting-\d+)\.partial|hashes\.partial")
UNFINISHED = re.compile(rf"{PARTIAL.pattern}|progress\.json")
TEMPORARY = re.compile(r"\.(manifest|progress|tokenizer)\.json\.tmp|\.tried(\.partial)?")
OF_A_START = re.compile(rf"{UNFINISHED.pattern}|{TEMPORARY.pattern}|tokenizer\.json|{re.escape(LOCK_FILE)}")
MAY_PASS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM,
)  # fmt: skip
GOES_ON = "What was made is kept, and the same command goes on from there"
LONGEST_PATH = 200  # characters of a path, or of a library's message


@contextmanager
def open_output_dirs(directories: Sequence[Path]) -> Iterator[None]:
    """Make the directories and keep other processes out of those that are not complete.

    Raises ConfigError if one cannot be written, is at work or holds other files, and RunFailed if it cannot be written
    for now. If the block raises ConfigError or DataError, what was made since is removed from those directories that
    hold nothing of value, and after Ctrl-C from those that the same command does not go on from.
    """
    made: list[Path] = []
    before: dict[Path, set[str]] = {}  # what was in those that are locked here
    with contextlib.ExitStack() as locks:
        try:
            for directory in directories:
                if "\0" in str(directory):
                    raise ConfigError(f"data.prepared = {shown(str(directory))}: a path without NUL is accepted")
                with writing(directory, at_work=False):
                    if (directory / MANIFEST_FILE).exists():
                        with contextlib.suppress(OSError):  # it is read where nothing can be written, too
                            remove(directory, UNFINISHED)
                            remove(directory, TEMPORARY)
                        continue
                    made += reversed([path for path in (directory, *directory.parents) if not path.exists()])
                    directory.mkdir(parents=True, exist_ok=True)
                    if _is_foreign(directory):
                        raise ConfigError(f"{directory}: holds other files; give data.prepared a directory of its own")
                    own = set() if (directory / LOCK_FILE).exists() else {LOCK_FILE}
                    locks.enter_context(locked(directory, f"{directory}: another p828 prepare is at work there"))
                    before[directory] = set(os.listdir(directory)) - own
                    remove(directory, TEMPORARY)
                    _try_out(directory)
            yield
        except (ConfigError, DataError, KeyboardInterrupt) as error:
            is_kept = is_begun if isinstance(error, KeyboardInterrupt) else _is_of_value
            for directory, names in before.items():
                if not is_kept(directory):
                    new = set(os.listdir(directory)) - names
                    _remove_all(directory, filter(OF_A_START.fullmatch, new))
            for path in reversed(made):
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            raise


@contextmanager
def writing(directory: Path, at_work: bool = True) -> Iterator[None]:
    """An error of the file system as RunFailed, or as ConfigError if nothing is at work yet and it will not pass."""
    try:
        yield
    except OSError as error:
        problem = f"{str(error.filename or directory)[-LONGEST_PATH:]}: cannot be written: {error.strerror or error}"
        if at_work or error.errno in MAY_PASS:
            raise RunFailed(f"{problem}\n{GOES_ON}") from None
        raise ConfigError(problem) from None


@contextmanager
def failures_at_work(is_at_work: Callable[[], bool]) -> Iterator[None]:
    """What the block finds wrong is raised as RunFailed if something has been made by then, which is kept."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not is_at_work():
            raise
        raise RunFailed(f"{error}\n{GOES_ON}") from error


def remove(directory: Path, names: re.Pattern[str]) -> None:
    """Remove the files of such names, which a process left there. Raises OSError."""
    for name in filter(names.fullmatch, os.listdir(directory)):
        (directory / name).unlink(missing_ok=True)


def _remove_all(directory: Path, names: Iterable[str]) -> None:
    with contextlib.suppress(OSError):  # another error, which says more, is being raised
        for name in names:
            (directory / name).unlink()


def _try_out(directory: Path) -> None:
    """Do once what writing shards needs, so that a file system that cannot do it ends the command here."""
    tried = directory / ".tried.partial"
    try:
        with open_appended(tried) as file:
            file.write(b"12")
            file.truncate(1)
            file.write(b"3")
            os.fsync(file.fileno())
        renamed = tried.with_name(".tried")
        os.replace(tried, renamed)
        renamed.unlink()
    except OSError as error:
        if error.errno in MAY_PASS:
            raise
        raise ConfigError(
            f"{directory}: files cannot be appended to, shortened and renamed there, which p828 prepare needs: "
            f"{error.strerror}"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # another one is being raised
            tried.unlink(missing_ok=True)


def _is_foreign(directory: Path) -> bool:
    """Whether it holds files of which none says that data is prepared here."""
    if is_begun(directory):
        return False
    # a process that is killed before it saves its first position leaves empty files
    return any(
        path.name != TOKENIZER_FILE and not (PARTIAL.fullmatch(path.name) and path.lstat().st_size == 0)
        for path in directory.glob("[!.]*")
    )


def is_begun(directory: Path) -> bool:
    """Whether it is complete, or the same command goes on from what it holds."""
    return (directory / PROGRESS_FILE).exists() or (directory / MANIFEST_FILE).exists()


def _is_of_value(directory: Path) -> bool:
    """Whether it holds tokens, safe on the disk or not."""
    if (directory / MANIFEST_FILE).exists():
        return True
    names = [name for pattern in ("*.tokens*", "*-waiting-*") for name in directory.glob(pattern)]
    return any(name.lstat().st_size for name in names)


def resolve_tokenizer(config: Config, directories: Sequence[Path], documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """One tokenizer for all directories, which keep a copy: what is begun decides, else the configuration.

    Raises ConfigError if two of them, or one and the configuration, do not go together, and RunFailed if it cannot be
    written for now.
    """
    begun = []
    for directory, data in zip(directories, (data for data in config.data.sources if data.prepared), strict=True):
        if (directory / MANIFEST_FILE).exists():
            manifest = open_manifest(directory)
            path, made, data = directory / MANIFEST_FILE, manifest.settings, with_paths_of(manifest, data)
        elif (directory / PROGRESS_FILE).exists():
            path = directory / PROGRESS_FILE
            made = read_progress(path)["settings"]
        else:
            with writing(directory, at_work=False):
                (directory / TOKENIZER_FILE).unlink(missing_ok=True)  # left by a command that came to nothing
            continue
        check_settings(made, settings(config, data), path)
        begun.append(directory)
    saved = [directory / TOKENIZER_FILE for directory in [*begun, *directories]]
    with _saving():
        is_chat = config.data.has_conversations  # in a mixture with what is prepared
        tokenizer = load_tokenizer(config.tokenizer, documents, config.model.vocab_size, saved[0], is_chat)
    for other in saved[1:]:
        if not other.exists():
            with _saving():
                tokenizer.save(other)
        elif Tokenizer.from_file(other, config.tokenizer.eos_token).fingerprint() != tokenizer.fingerprint():
            raise ConfigError(f"{other}: another tokenizer than {saved[0]}: sources of a mixture are prepared with one")
    for directory in begun:
        if (directory / MANIFEST_FILE).exists():
            check_tokenizer(open_manifest(directory), tokenizer, directory)
    return tokenizer


@contextmanager
def _saving() -> Iterator[None]:
    """A tokenizer that cannot be written for now is no wrong input."""
    try:
        yield
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in MAY_PASS:
            raise RunFailed(f"{error}\n{GOES_ON}") from error
        raise


def read_progress(path: Path) -> dict[str, Any]:
    """What an interrupted preparation left. Raises ConfigError if it is damaged, and RunFailed if it cannot be read."""
    try:
        content = read_limited(path, LARGEST_FILE)
        progress: dict[str, Any] = json.loads(content)
        check_seal(content, progress)
        for key, kind in PROGRESS_TYPES.items():
            if not isinstance(progress[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in MAY_PASS:
            raise RunFailed(f"{path}: cannot be read: {error.strerror}\n{GOES_ON}") from None
        problem = str(error)[:LONGEST_PATH]
        raise ConfigError(f"{path}: damaged: {problem}. Remove {path.parent} to begin again") from None
    return progress
