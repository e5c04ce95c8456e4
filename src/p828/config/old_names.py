"""Names that fields of the configuration had before: read as today's, and written where a hash counts on them."""

from collections.abc import Callable, Mapping
from typing import Any

from p828.config.facts import fields_of
from p828.errors import ConfigError

Table = dict[str, Any]


def renamed(cls: type[Any], values: Mapping[str, Any], where: str) -> tuple[Table, dict[str, str]]:
    """`values`, nested plain ones for the dataclass `cls`, under today's names; and old dotted key to today's.

    Raises ConfigError, with `where` before it, if a value is given under both names.
    """
    found: dict[str, str] = {}

    def rename(cls: type[Any], table: Table, prefix: str) -> Table:
        names = {old: new for old, new in old_names(cls).items() if old in table}
        for old, new in names.items():
            if new in table:
                raise ConfigError(
                    f"{where}: {prefix}{old} and {prefix}{new} are both given: {old} is the old name of {new}; "
                    f"give {prefix}{new} alone"
                )
            found[prefix + old] = prefix + new
        return {names.get(key, key): value for key, value in table.items()}

    return _each_table(cls, values, "", rename), found


def under_old_names(cls: type[Any], values: Mapping[str, Any]) -> Table:
    """`values`, nested plain ones for the dataclass `cls`, with old names in place of today's."""

    def rename(cls: type[Any], table: Table, prefix: str) -> Table:
        names = {new: old for old, new in old_names(cls).items()}
        return {names.get(key, key): value for key, value in table.items()}

    return _each_table(cls, values, "", rename)


def old_names(cls: type[Any]) -> dict[str, str]:
    """Old name to today's, of the dataclass's own fields."""
    facts = {own.name: own.metadata["facts"] for own, _ in fields_of(cls) if own.metadata}
    return {fact.old_name: name for name, fact in facts.items() if fact.old_name}


def _each_table(
    cls: type[Any], values: Mapping[str, Any], prefix: str, change: Callable[[type[Any], Table, str], Table]
) -> Table:
    """The result of `change` for the table of a dataclass and for those of its sections, each with its dotted prefix.

    What should be a table and is none stays as it is.
    """
    result = change(cls, dict(values), prefix)
    for own, section in fields_of(cls):
        value, name = result.get(own.name), prefix + own.name
        if section is not None and isinstance(value, Mapping):
            result[own.name] = _each_table(section, value, f"{name}.", change)
        elif section is not None and isinstance(value, list):
            result[own.name] = [
                _each_table(section, item, f"{name}[{i}].", change) if isinstance(item, Mapping) else item
                for i, item in enumerate(value)
            ]
    return result
