"""Overrides of a configuration that was read, as a program gives them: dotted keys and plain values."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from p828.config.files import dotted_keys, from_dict, implied, set_keys
from p828.config.old_names import renamed
from p828.config.schema import Config
from p828.errors import ConfigError

WHERE = "overrides"  # in messages, in place of a file's name


@dataclass(frozen=True)
class Overrides:
    values: dict[str, Any]
    """Dotted key to a value of the field's type, for `values.changed`; also what the given keys imply."""
    given: frozenset[str]
    """The dotted keys that were given; `key[0].inner` in a list of tables."""
    old_names: list[str]
    """A line for each key that was given by an old name."""


def read_overrides(overrides: Mapping[str, Any], before: Collection[str] = ()) -> Overrides:
    """Overrides under today's names and in their fields' types.

    A key is dotted, as "train.steps", or names a table, as "train", whose value is a mapping. Lists may be tuples, and
    texts paths. `before` are the keys of the files that the overrides change. Raises ConfigError naming the key.
    """
    nested, old_names = renamed(Config, _nested(overrides), WHERE)
    given = frozenset(dotted_keys(nested))
    set_keys(nested, implied(given, before))
    partial = from_dict(nested, WHERE)
    values = {key: attrgetter(key)(partial) for key in _fields(nested)}
    return Overrides(values, given, [f"{WHERE}: {old} is now {new}" for old, new in old_names.items()])


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables in place of dotted keys. Raises ConfigError for a key that is given twice."""
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        *names, last = str(key).split(".")
        table: Any = nested
        for name in names:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{WHERE}: {key}: {name} is given as a value and as a table")
        if last in table:
            raise ConfigError(f"{WHERE}: {key} is given twice")
        table[last] = _plain(value)
    return nested


def _plain(value: Any) -> Any:
    """The value as TOML has it."""
    if isinstance(value, Mapping):
        return _nested(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fields(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of the fields in nested tables; a list of tables is one field."""
    fields: list[str] = []
    for name, value in values.items():
        fields += _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return fields
