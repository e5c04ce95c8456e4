"""Nested frozen dataclasses from the plain values of a TOML file, and back."""

import contextlib
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from p828.errors import ConfigError, did_you_mean

T = TypeVar("T")
MOST_BITS = 1024  # of a whole number; Python writes none of more than 4,300 digits
LONGEST_SHOWN = 80  # characters of a key or a value
LONGEST_SHOWN_PATH = 300


def build(cls: type[T], values: Any, where: str, prefix: str = "") -> T:
    """A dataclass from plain values of its fields' types. Raises ConfigError naming the key, `prefix` before it."""
    if not isinstance(values, Mapping):
        table = prefix.rstrip(".")
        raise ConfigError(f"{where}: {table} = {shown(values)}: a table is accepted, [{table}] with its keys below")
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            name = prefix + (key if len(key) <= LONGEST_SHOWN else key[: LONGEST_SHOWN - 1] + "…")
            near = did_you_mean(name, (prefix + name for name in types))
            raise ConfigError(f"{where}: unknown key {name}{near} Accepted: {', '.join(types)}")
    return cls(**{key: _convert(types[key], value, where, prefix + key) for key, value in values.items()})


_ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts in quotes"}


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where, key + ".")
    given = f"{where}: {key} = {shown(value)}"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{given}{did_you_mean(str(value), arguments)} Accepted: {', '.join(arguments)}")
    if origin is tuple:
        return _convert_list(arguments, value, where, key)
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    if type(value) is kind and not (kind is int and value.bit_length() > MOST_BITS):
        return value
    raise ConfigError(f"{given}: {_ONE[kind]} is accepted")


def _convert_list(kinds: tuple[Any, ...], values: Any, where: str, key: str) -> tuple[Any, ...]:
    """A tuple of `kinds` from a list; (str, ...) takes any number of texts."""
    any_length = kinds[-1] is Ellipsis
    if not isinstance(values, list) or (not any_length and len(values) != len(kinds)):
        size = "a list of" if any_length else f"a list of {len(kinds)}"
        raise ConfigError(f"{where}: {key} = {shown(values)}: {size} {_MANY.get(kinds[0], 'tables')} is accepted")
    kinds = kinds[:1] * len(values) if any_length else kinds
    return tuple(_convert(k, v, where, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, values, strict=True)))


def shown(value: Any, longest: int = LONGEST_SHOWN) -> str:
    """A value as TOML or JSON spell it, more or less, of at most `longest` characters."""
    if value is None:
        return "null"
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, a list in a list in a list …
        return "…"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def shown_path(path: object) -> str:
    """A path short enough for a line, control characters escaped."""
    text = str(path)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= LONGEST_SHOWN_PATH else text[: LONGEST_SHOWN_PATH - 1] + "…"


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain values of a configuration, as TOML takes them."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, in the order of the dataclasses; `key[0].inner` in a list of tables."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        key, value = prefix + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{key}."))
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for i, item in enumerate(value):
                flat.update(flatten(item, f"{key}[{i}]."))
        else:
            flat[key] = value
    return flat


def changed(base: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass instance with the values at dotted keys."""
    own = {key: value for key, value in values.items() if "." not in key}
    for table in dict.fromkeys(key.partition(".")[0] for key in values if "." in key):
        inner = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{table}.")}
        own[table] = changed(getattr(base, table), inner)
    return dataclasses.replace(base, **own)
