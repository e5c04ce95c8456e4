"""Names that fields of the configuration had before, read as today's."""

from collections.abc import Mapping
from typing import Any

from p828.config.facts import fields_of
from p828.errors import ConfigError


def renamed(cls: type[Any], values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """`values`, nested plain ones for the dataclass `cls`, under today's names; and old dotted key to today's.

    Raises ConfigError, with `where` before it, if a value is given under both names.
    """
    found: dict[str, str] = {}
    return _renamed(cls, values, where, "", found), found


def _renamed(cls: type[Any], values: Mapping[str, Any], where: str, prefix: str, found: dict[str, str]) -> Any:
    result = dict(values)
    for old, new in old_names(cls).items():
        if old in result:
            if new in result:
                raise ConfigError(
                    f"{where}: {prefix}{old} and {prefix}{new} are both given: the first is the second's old name; "
                    f"give {prefix}{new}"
                )
            result = {new if key == old else key: value for key, value in result.items()}
            found[prefix + old] = prefix + new
    for own, section in fields_of(cls):
        value = result.get(own.name)
        if section is not None and isinstance(value, Mapping):
            result[own.name] = _renamed(section, value, where, f"{prefix}{own.name}.", found)
        elif section is not None and isinstance(value, list):
            result[own.name] = [
                _renamed(section, item, where, f"{prefix}{own.name}[{i}].", found)
                if isinstance(item, Mapping)
                else item
                for i, item in enumerate(value)
            ]
    return result


def old_names(cls: type[Any]) -> dict[str, str]:
    """Old name to today's, of the fields of one dataclass."""
    facts = {own.name: own.metadata["facts"] for own, _ in fields_of(cls) if "facts" in own.metadata}
    return {fact.old_name: name for name, fact in facts.items() if fact.old_name}
