"""The files of a configuration: presets and TOML files, each over the one that its `base` names.

What is read here are plain values under the keys that the files give; `config` makes settings of them.
"""

import codecs
import contextlib
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from p828.config.facts import facts_by_key, facts_of
from p828.config.old_names import renamed
from p828.config.rules import MOST_TEXT
from p828.config.schema import Config
from p828.config.values import build, flatten, shown, shown_path
from p828.errors import ConfigError, did_you_mean, warn
from p828.files import read_limited

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_FILE = "config.toml"  # in a run's directory
HUB_FILE = "config.json"  # of a model in the hub's layout
PRESETS = Path(__file__).parent / "presets"
LARGEST_FILE = 2 * MOST_TEXT  # any configuration that `validate` accepts is shorter
MOST_DOTS = 200  # in a line: what tomllib takes for a key grows with the square of its parts
# The beginning of a text of several lines; a text of one line; a comment.
TEXT = re.compile(r"""\"{3}|'{3}|"(?:[^"\\]|\\.)*"|'[^']*'|\#.*""")
LONGEST_PATH = 4000
MAX_BASES = 8  # how deep `base` may nest; a cycle ends here


class Loaded(NamedTuple):
    """A configuration that was read."""

    config: Config
    given: frozenset[str]
    """The dotted keys that the user's own TOML files give.

    A preset's keys are not the user's, nor are those of a file that lists nearly all there are, as a run's config.toml
    and the output of `--dry-run` do.
    """
    old_names: list[str]
    """A line for each key that the user's own files give by an old name; none for a run's config.toml."""


def load(name_or_path: str) -> Config:
    """Read a preset, a TOML file with its bases, or a run's directory, and warn of old names of keys.

    Raises ConfigError; does not `validate`.
    """
    loaded = load_given(name_or_path)
    for line in loaded.old_names:
        warn(line)
    return loaded.config


def load_given(name_or_path: str) -> Loaded:
    """As `load`, with what the user's own files give, and without the warnings. Raises ConfigError."""
    path = Path(name_or_path)
    is_named = path.suffix == ".toml" or name_or_path in ("", *preset_names())
    is_run = not is_named and _is_directory(path)
    if is_run:
        refuse_exported(path)
    if is_run and not (path / RUN_FILE).is_file():
        raise ConfigError(f"{shown(name_or_path)} is a directory, but no run: it holds no {RUN_FILE}")
    try:
        num_keys = len(flatten(Config()))
        values = read_with_bases(str(path / RUN_FILE) if is_run else name_or_path, num_keys)
        config = from_dict(values.values, RUN_FILE if is_run else path.name)
    except RecursionError:
        raise ConfigError(f"{name_or_path}: cannot be read: nested too deeply") from None
    if is_run:  # which may have been moved
        path = path if path.name not in ("", "..") else path.resolve()
        config = dataclasses.replace(config, name=path.name, runs_dir=str(path.parent))
    config = config if config.name else dataclasses.replace(config, name=path.stem)
    return Loaded(config, values.given, values.old_names)


def refuse_exported(directory: Path) -> None:
    """Raises ConfigError for a model in the hub's layout; one that p828 exported has a config.toml, too."""
    if (directory / HUB_FILE).is_file():
        word = shlex.quote(str(directory))
        raise ConfigError(
            f"{directory} is a model in the hub's layout, no run: a new run starts from it with "
            f"p828 train CONFIG --name NEW --train.init-from {word}; p828 import {word} makes it one"
        )


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """Build a Config from nested plain values, as TOML gives them, under today's names or old ones.

    Raises ConfigError naming the key.
    """
    return build(Config, renamed(Config, values, where)[0], where)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


@dataclass(frozen=True)
class Values:
    """What files say, as nested plain values under today's names, and the rest of `Loaded`."""

    values: dict[str, Any]
    given: frozenset[str] = frozenset()
    old_names: list[str] = field(default_factory=list)


def read_with_bases(name_or_path: str, num_keys: int, depth: int = 0) -> Values:
    """A preset or file over its bases.

    `num_keys` is how many keys a configuration has. A file with more than half of them was written by p828: its keys do
    not count as the user's. Raises ConfigError, and RecursionError for tables nested too deeply.
    """
    path = _find(name_or_path)
    values = read_toml(path)
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or depth == MAX_BASES):
        raise ConfigError(
            f"{path}: base = {shown(base)}: give a preset's name or a .toml file, nested at most {MAX_BASES} deep"
        )
    values, old_names = renamed(Config, values, str(path))
    given = frozenset(dotted_keys(values))
    is_whole = len(given) > num_keys / 2
    below = Values({})
    if base is not None:
        below = read_with_bases(str(path.parent / base) if base.endswith(".toml") else base, num_keys, depth + 1)
    if not is_whole:
        set_keys(values, implied(given, below.given))
    is_users = not is_whole and name_or_path.endswith(".toml")
    lines = [f"{path}: {old} is now {new}" for old, new in old_names.items()]
    if is_whole and path.name == RUN_FILE:  # which p828 wrote, and will write again
        lines = []
    return Values(
        merged(below.values, values), below.given | given if is_users else below.given, [*below.old_names, *lines]
    )


def _find(name_or_path: str) -> Path:
    """The file of a preset, or the TOML file of that name. Raises ConfigError if it can be neither."""
    if len(name_or_path) > LONGEST_PATH:
        raise ConfigError(f"no file {shown(name_or_path)}: at most {LONGEST_PATH} characters are accepted")
    path, known = Path(name_or_path), preset_names()
    if path.suffix == ".toml":
        return path
    if name_or_path in known:
        return PRESETS / f"{name_or_path}.toml"
    if os.path.isfile(name_or_path):
        raise ConfigError(
            f"{shown(name_or_path)} is no configuration: a preset, a .toml file or a run's directory is "
            "accepted. Text is given besides, as in p828 train quickstart --data.files FILE"
        )
    raise ConfigError(
        f"no preset {shown(name_or_path)}{did_you_mean(name_or_path[:80], known)} Presets: {', '.join(known)}; "
        "or give the path of a .toml file or a run's directory"
    )


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of one file; `base` is one of them, and not followed. Raises ConfigError naming the file."""
    try:
        content = read_limited(path, LARGEST_FILE)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
            raise ValueError("it is UTF-16 or no text; TOML is UTF-8 text")
        text = content.decode("utf-8-sig")  # some editors put a byte order mark before it
        _check_dots(text)
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"no file {shown_path(path)}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: cannot be read as TOML: line {line} holds the byte 0x{content[error.start]:02x}, "
            "which is not UTF-8; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{shown_path(path)}: cannot be read as TOML: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not TOML, a number too long, or a name that no file can have
        raise ConfigError(f"{shown_path(path)}: cannot be read as TOML: {error}") from None


def _check_dots(text: str) -> None:
    """Raises ValueError if a line has more than `MOST_DOTS` in its keys; after a text of several lines, anywhere."""
    is_plain = True
    for line in text.split("\n"):
        if is_plain:
            keys = TEXT.sub(lambda found: found[0] if found[0] in ('"""', "'''") else "", line)
            is_plain = '"""' not in keys and "'''" not in keys
        if (keys if is_plain else line).count(".") > MOST_DOTS:
            raise ValueError(f"a line has more than {MOST_DOTS} dots")


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of nested tables; `key[0].inner` in a list of tables."""
    keys: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                keys += dotted_keys(item, f"{prefix}{name}[{i}].")
        else:
            keys.append(prefix + name)
    return keys


def set_keys(values: dict[str, Any], changes: Mapping[str, str]) -> None:
    """Put values at dotted keys, making the tables that they need."""
    for key, value in changes.items():
        *tables, last = key.split(".")
        table = values
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # no table: refused later
            for name in tables:
                list_name, _, number = name.rstrip("]").partition("[")
                table = table[list_name][int(number)] if number else table.setdefault(name, {})
            table[last] = value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with the values of `over` in place of those of `base`."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def implied(given: Collection[str], before: Collection[str] = ()) -> dict[str, str]:
    """What keys that are given together imply: dotted key to value, for `data.source` and its like.

    `before` are the keys of files that the given keys change. Raises ConfigError if the given keys imply different
    kinds.
    """
    facts, found = facts_by_key(Config), dict[str, tuple[str, str]]()
    for key in sorted(given):
        try:
            value, kind = facts_of(facts, key).implies, kind_key(key)
        except KeyError:  # an unknown key: refused where it is read
            continue
        if not value or kind in given:
            continue
        if kind in found and found[kind][0] != value:
            raise ConfigError(f"{found[kind][1]} and {key} are both given: {kind} says which one is meant")
        found[kind] = value, key
    is_validation_given = any(key.startswith("data.validation.") for key in (*given, *before))
    if "data.files" in given and not is_validation_given:  # a preset's split belongs to the preset's source
        found["data.validation.kind"] = "held_out", "data.files"
    return {kind: value for kind, (value, _) in found.items()}


def kind_key(key: str) -> str:
    """The key that says which kind of source or of validation a key of that table is for."""
    table = key.rpartition(".")[0]
    return f"{table}.kind" if table == "data.validation" else f"{table}.source"
