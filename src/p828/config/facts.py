"""What is true of a field of the configuration, said where the field is declared.

`hidden_size: int = fixed(512, at_least=1)` declares a number of at least 1, by default 512, which a run keeps once it
has a checkpoint.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
INFINITY = float("inf")
LARGEST_INT = 2**31 - 1
INDEX = re.compile(r"\[\d+\]")  # of a table in a list of tables, in a dotted key


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A number has a lower bound, `at_least` or `above`, and may have an upper one, `at_most` or `below`."""

    is_fixed: bool
    """Whether a run that has a checkpoint keeps the value: it decides the weights' shapes, or which samples come when.
    """
    decides_tokens: bool | None = None
    """Whether it decides the tokens that `p828 prepare` writes, their order or their division into files.

    Every field of the sections `data`, `tokenizer` and `prepare` says it, and no other does.
    """
    only_trains: bool = False
    """Of the section `data`: whether it changes nothing that `p828 evaluate` measures."""
    at_least: float = -INFINITY
    above: float = -INFINITY
    at_most: float = INFINITY
    below: float = INFINITY
    implies: str = ""
    """Of the sections `data` and `data.validation`: the kind of source or of validation that the key means."""
    only_with: tuple[str, ...] = ()
    """Of these sections: the kinds with which the key has an effect, where it does not imply one."""
    is_prose: bool = False
    """Whether a text is never part of a file's name, and so may be of any length."""
    with_deepspeed: tuple[str, ...] = ()
    """The values that are accepted with `engine = "deepspeed"`; empty: all."""
    with_sharded: tuple[str, ...] = ()
    """The values that are accepted with `engine = "sharded"`; empty: all."""
    old_name: str = ""
    """The name that the field had before. Configurations that use it are still read."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of source or validation with which the key has an effect; none if it has with any."""
        return (self.implies,) if self.implies else self.only_with

    @property
    def has_range(self) -> bool:
        return max(self.at_least, self.above) > -INFINITY

    def accepts(self, number: float) -> bool:
        """Whether the number is in the range. NaN and infinity are in none."""
        at_most = min(self.at_most, LARGEST_INT) if isinstance(number, int) else self.at_most
        return self.above < number < self.below and self.at_least <= number <= at_most

    def accepted(self, kind: type[int] | type[float]) -> str:
        """The range in words, of whole numbers or of any."""
        if kind is int:
            return f"a whole number from {self.at_least} to {min(self.at_most, LARGEST_INT)}"
        if self.below < INFINITY:
            return f"a fraction from {self.at_least} to below {self.below}"
        if self.at_most < INFINITY:
            return f"a fraction from {self.at_least} to {self.at_most}"
        return f"a number above {self.above}" if self.above > -INFINITY else f"a number of at least {self.at_least}"


def fixed(default: T, **facts: Any) -> T:
    """A dataclass field that a run keeps once it has a checkpoint, with other `Facts` about it."""
    return _field(default, Facts(is_fixed=True, **facts))


def changeable(default: T, **facts: Any) -> T:
    """A dataclass field that may change whenever a run is resumed, with other `Facts` about it."""
    return _field(default, Facts(is_fixed=False, **facts))


def _field(default: T, facts: Facts) -> T:
    return field(default=default, metadata={"facts": facts})


def facts_by_key(cls: type[Any], prefix: str = "") -> dict[str, Facts]:
    """The facts about all fields of a dataclass and of its sections, by dotted key.

    The keys in a list of tables are `key.inner`, whatever the table's number. Raises KeyError for a field that has no
    facts.
    """
    found: dict[str, Facts] = {}
    for own, section in fields_of(cls):
        if section is None or own.metadata:  # a list of tables is a field itself
            found[prefix + own.name] = own.metadata["facts"]
        if section is not None:
            found |= facts_by_key(section, f"{prefix}{own.name}.")
    return found


def facts_of(facts: Mapping[str, Facts], key: str) -> Facts:
    """The facts about a key as `values.flatten` spells it: `key[0].inner` in a list of tables. Raises KeyError."""
    return facts[INDEX.sub("", key)]


def fields_of(cls: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], type[Any] | None]]:
    """Each field of a dataclass, with the dataclass that its table, or each table in its list, is read as."""
    kinds = typing.get_type_hints(cls)
    for own in dataclasses.fields(cls):
        kind = kinds[own.name]
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        yield own, inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None


def deciding_tokens(section: Any) -> dict[str, Any]:
    """The nested plain values of a section's fields that decide the tokens of prepared data."""
    found: dict[str, Any] = {}
    for own, inner in fields_of(type(section)):
        value = getattr(section, own.name)
        if own.metadata:
            if own.metadata["facts"].decides_tokens:
                found[own.name] = list(value) if isinstance(value, tuple) else value
        elif inner is not None:
            found[own.name] = deciding_tokens(value)
    return found
