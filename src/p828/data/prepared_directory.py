"""A directory that data is prepared into: who may, with what settings and which tokenizer."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p828.config import Config, DataConfig
from p828.config_values import to_dict
from p828.data.manifest import LARGEST_FILE, MANIFEST_FILE, TOKENIZER_FILE, check_tokenizer, open_manifest
from p828.data.tokenizer import Tokenizer, load_tokenizer
from p828.errors import UserError
from p828.files import locked, read_limited

PROGRESS_FILE, HASHES_FILE = "progress.json", "hashes.partial"
OF_THE_TOKENS = (  # keys of the section data that decide them
    "source", "files", "text_field", "hub_name", "hub_subset", "hub_split", "packing", "validation",
)  # fmt: skip


@contextmanager
def entered(directories: Sequence[Path]) -> Iterator[None]:
    """Make the directories and keep other processes out of those that are not complete.

    Raises UserError if one cannot be written, is at work or holds other files. Those made here are removed again if the
    block raises UserError.
    """
    made: list[Path] = []
    with contextlib.ExitStack() as locks:
        for directory in directories:
            if (directory / MANIFEST_FILE).exists():
                continue
            try:
                if not directory.exists():
                    directory.mkdir(parents=True)
                    made.append(directory)
                elif _is_foreign(directory):
                    raise UserError(f"{directory}: holds other files; give data.prepared a directory of its own")
                locks.enter_context(locked(directory, f"{directory}: another p828 prepare is at work there"))
            except OSError as error:
                raise UserError(f"{error.filename or directory}: cannot be written: {error.strerror}") from None
        try:
            yield
        except UserError:
            for directory in made:
                shutil.rmtree(directory)
            raise


def _is_foreign(directory: Path) -> bool:
    """Whether it holds files of which none says that data is prepared here."""
    begun = (directory / PROGRESS_FILE).exists() or (directory / MANIFEST_FILE).exists()
    return not begun and any(path.name != TOKENIZER_FILE for path in directory.glob("[!.]*"))


def settle_tokenizer(config: Config, directories: Sequence[Path], documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """One tokenizer for all directories, which keep a copy: what is begun decides, else the configuration.

    Raises UserError if two of them, or one and the configuration, do not go together.
    """
    begun = []
    for directory, data in zip(directories, (data for data in config.data.sources if data.prepared), strict=True):
        if (directory / MANIFEST_FILE).exists():
            path, made = directory / MANIFEST_FILE, open_manifest(directory).settings
        elif (directory / PROGRESS_FILE).exists():
            path = directory / PROGRESS_FILE
            made = read_progress(path)["settings"]
        else:
            (directory / TOKENIZER_FILE).unlink(missing_ok=True)  # left by a command that came to nothing
            continue
        check_settings(made, settings(config, data), path)
        begun.append(directory)
    saved = [directory / TOKENIZER_FILE for directory in [*begun, *directories]]
    tokenizer = load_tokenizer(config.tokenizer, documents, config.model.vocab_size, saved[0])
    for other in saved[1:]:
        if not other.exists():
            tokenizer.save(other)
        elif Tokenizer.from_file(other, config.tokenizer.eos_token).fingerprint() != tokenizer.fingerprint():
            raise UserError(f"{other}: another tokenizer than {saved[0]}: sources of a mixture are prepared with one")
    for directory in begun:
        if (directory / MANIFEST_FILE).exists():
            check_tokenizer(open_manifest(directory), tokenizer, directory)
    return tokenizer


def read_progress(path: Path) -> dict[str, Any]:
    """What an interrupted preparation left. Raises UserError if it is damaged."""
    try:
        progress: dict[str, Any] = json.loads(read_limited(path, LARGEST_FILE))
        progress["settings"]["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {error}. Remove {path.parent} to begin again") from None
    return progress


def settings(config: Config, data: DataConfig | None = None) -> dict[str, Any]:
    """What decides the tokens of prepared data, their order and their division into files."""
    return {
        "data": data_settings(config.data if data is None else data),
        "tokenizer": to_dict(config.tokenizer),
        "prepare": to_dict(config.prepare),
    }


def data_settings(data: DataConfig) -> dict[str, Any]:
    """The part of `settings` that training has to have as well."""
    keys = (*OF_THE_TOKENS, "sequence_length") if data.packing == "best_fit" else OF_THE_TOKENS
    values = to_dict(data)
    return {key: values[key] for key in keys}


def check_settings(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raises UserError with the first setting that is another."""
    for section, values in now.items():
        for key, value in values.items():
            made = before[section].get(key)
            if (section, key) == ("tokenizer", "vocab_size") and values["name"] != "train":
                continue  # of a trained one
            if made != value:
                raise UserError(
                    f"{path}: made with {section}.{key} = {made!r}, not {value!r}. Set it back, or give another "
                    "directory as data.prepared"
                )
