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

from p828.config import Config, DataConfig
from p828.config.values import shown, to_dict
from p828.data.tokenizer import Tokenizer, load_tokenizer
from p828.data.tokens.format import MANIFEST_FILE, TOKENIZER_FILE, check_tokenizer, open_manifest
from p828.data.tokens.sealed import LARGEST_FILE, check_seal
from p828.errors import ConfigError, RunStopped
from p828.files import LOCK_FILE, locked, open_appended, read_limited

PROGRESS_FILE, HASHES_FILE = "progress.json", "hashes.partial"
OF_THE_TOKENS = (  # keys of the section data that decide them
    "source", "files", "text_field", "hub_name", "hub_subset", "hub_split", "packing", "validation",
)  # fmt: skip
LONGEST_DOCUMENT = "max_document_megabytes"  # decides them, too: what is longer is divided, or no document
PROGRESS_TYPES = {
    "settings": dict, "tokenizer": str, "reader": int, "position": dict, "counts": list, "tokens": int, "hashes": dict,
    "training": dict, "validation": dict,
}  # fmt: skip
PARTIAL = re.compile(r"(training|validation)-(\d{5,}\.(tokens|documents)|waiting-\d+)\.partial|hashes\.partial")
UNFINISHED = re.compile(rf"{PARTIAL.pattern}|progress\.json")
TEMPORARY = re.compile(r"\.(manifest|progress|tokenizer)\.json\.tmp|\.tried(\.partial)?")
MAY_PASS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM,
)  # fmt: skip
GOES_ON = "What was made is kept, and the same command goes on from there"
LONGEST_VALUE = 200  # characters of a setting in a message


@contextmanager
def open_output_dirs(directories: Sequence[Path]) -> Iterator[None]:
    """Make the directories and keep other processes out of those that are not complete.

    Raises ConfigError if one cannot be written, is at work or holds other files, and RunStopped if it cannot be written
    for now. If the block raises ConfigError, what was made since is removed from those that hold nothing of value.
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
        except ConfigError:
            for directory, names in before.items():
                if not _is_of_value(directory):
                    _remove_all(directory, set(os.listdir(directory)) - names)
            for path in reversed(made):
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            raise


@contextmanager
def writing(directory: Path, at_work: bool = True) -> Iterator[None]:
    """An error of the file system as RunStopped, or as ConfigError if nothing is at work yet and it will not pass."""
    try:
        yield
    except OSError as error:
        said = f"{str(error.filename or directory)[-LONGEST_VALUE:]}: cannot be written: {error.strerror or error}"
        if at_work or error.errno in MAY_PASS:
            raise RunStopped(f"{said}\n{GOES_ON}") from None
        raise ConfigError(said) from None


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
    if (directory / PROGRESS_FILE).exists() or (directory / MANIFEST_FILE).exists():
        return False
    # a process that is killed before it saves its first position leaves empty files
    return any(
        path.name != TOKENIZER_FILE and not (PARTIAL.fullmatch(path.name) and path.lstat().st_size == 0)
        for path in directory.glob("[!.]*")
    )


def _is_of_value(directory: Path) -> bool:
    """Whether it holds tokens, safe on the disk or not."""
    if (directory / MANIFEST_FILE).exists():
        return True
    names = [name for pattern in ("*.tokens*", "*-waiting-*") for name in directory.glob(pattern)]
    return any(name.lstat().st_size for name in names)


def resolve_tokenizer(config: Config, directories: Sequence[Path], documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """One tokenizer for all directories, which keep a copy: what is begun decides, else the configuration.

    Raises ConfigError if two of them, or one and the configuration, do not go together, and RunStopped if it cannot be
    written for now.
    """
    begun = []
    for directory, data in zip(directories, (data for data in config.data.sources if data.prepared), strict=True):
        if (directory / MANIFEST_FILE).exists():
            path, made = directory / MANIFEST_FILE, open_manifest(directory).settings
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
        tokenizer = load_tokenizer(config.tokenizer, documents, config.model.vocab_size, saved[0])
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
            raise RunStopped(f"{error}\n{GOES_ON}") from error
        raise


def read_progress(path: Path) -> dict[str, Any]:
    """What an interrupted preparation left. Raises ConfigError if it is damaged, and RunStopped if it cannot be read."""
    try:
        content = read_limited(path, LARGEST_FILE)
        progress: dict[str, Any] = json.loads(content)
        check_seal(content, progress)
        for key, kind in PROGRESS_TYPES.items():
            if not isinstance(progress[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in MAY_PASS:
            raise RunStopped(f"{path}: cannot be read: {error.strerror}\n{GOES_ON}") from None
        said = str(error)[:LONGEST_VALUE]
        raise ConfigError(f"{path}: damaged: {said}. Remove {path.parent} to begin again") from None
    return progress


def settings(config: Config, data: DataConfig | None = None) -> dict[str, Any]:
    """What decides the tokens of prepared data, their order and their division into files."""
    data = config.data if data is None else data
    return {
        "data": {**data_settings(data), LONGEST_DOCUMENT: getattr(data, LONGEST_DOCUMENT)},
        "tokenizer": to_dict(config.tokenizer),
        "prepare": to_dict(config.prepare),
    }


def data_settings(data: DataConfig) -> dict[str, Any]:
    """The part of `settings` that training has to have as well."""
    keys = (*OF_THE_TOKENS, "sequence_length") if data.packing == "best_fit" else OF_THE_TOKENS
    values = to_dict(data)
    if not data.validation.hub_revision:
        del values["validation"]["hub_revision"]  # which data prepared by an earlier version does not know
    return {key: values[key] for key in keys}


def check_settings(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raises ConfigError with the first setting that is another."""
    for section, values in now.items():
        for key, value in values.items():
            made = before[section].get(key)
            if (section, key) == ("tokenizer", "vocab_size") and values["name"] != "train":
                continue  # of a trained one
            if key == LONGEST_DOCUMENT and key not in before[section]:
                continue  # prepared by a version that did not keep it
            if made != value:
                old, new = shown(made, LONGEST_VALUE), shown(value, LONGEST_VALUE)
                raise ConfigError(
                    f"{path}: made with {section}.{key} = {old}, not {new}. Give the configuration and flags that it "
                    "was prepared with, or another directory as data.prepared"
                )
