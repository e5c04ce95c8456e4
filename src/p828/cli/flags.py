"""Dataclasses as flags: tyro parses them and prints the help; a wrong flag is answered in a line."""

import contextlib
import dataclasses
import io
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import tyro

from p828.errors import UserError, nearest

T = TypeVar("T")
HELP = ("-h", "--help")


def parse(
    cls: type[T],
    arguments: list[str],
    prog: str,
    default: T | None = None,
    description: str = "",
    others: tuple[str, ...] = (),
) -> T:
    """An instance of the dataclass `cls` from `--section.key value` flags over `default`.

    `--help` prints every flag with its help, type and default, and exits 0. `others` are flags that the caller has
    taken out before, for the suggestion. Raises UserError for an unknown flag, naming the nearest one, and for a value
    of the wrong type.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{argument!r} is not valid Unicode text") from None
    kinds = dict(_flags(cls, "--"))
    if not any(argument in HELP for argument in arguments):
        for argument in arguments:
            name = _name(argument)
            if name.startswith("--") and name not in kinds:
                raise UserError(f"unknown flag {name}{nearest(name, [*kinds, *others, *HELP])} --help lists all")
    with contextlib.redirect_stderr(io.StringIO()) as complaint:
        try:
            return tyro.cli(
                cls,
                args=arguments,
                prog=prog,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.FlagConversionOff,),
            )
        except SystemExit as stop:
            if not stop.code:
                raise
    raise UserError(_diagnosis(kinds, arguments) or " ".join(complaint.getvalue().split()))


def _flags(cls: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every flag with its type."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name.replace("_", "-"), kinds[field.name]
        if typing.get_origin(kind) is Annotated:
            kind, *markers = typing.get_args(kind)
            if tyro.conf.UseCounterAction in markers:  # given without a value
                kind = None
        if dataclasses.is_dataclass(kind):
            yield from _flags(typing.cast(type, kind), name + ".")
        else:
            yield name, kind


def _name(argument: str) -> str:
    """`--section.some_key=3` to `--section.some-key`."""
    return argument.split("=", 1)[0].replace("_", "-")


def _diagnosis(kinds: dict[str, Any], arguments: list[str]) -> str | None:
    """What is wrong with the first flag whose values its type does not take; None if it is something else."""
    values: dict[str, list[str]] = {"": []}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            values[_name(name)] = [value] if value else []
        else:
            values[_name(name)].append(argument)
    for name, given in values.items():
        if kinds.get(name) is not None and not _takes(kinds[name], given):
            return f"{name} {' '.join(given)}: {_words(kinds[name])} is accepted".replace(" :", ":")
    return None


def _takes(kind: Any, given: list[str]) -> bool:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        is_any = arguments[-1] is Ellipsis
        return (is_any or len(given) == len(arguments)) and all(_takes(arguments[0], [value]) for value in given)
    if len(given) != 1:
        return False
    if typing.get_origin(kind) is Literal:
        return given[0] in arguments
    if kind is bool:
        return given[0] in ("True", "False")
    try:
        kind(given[0])
    except ValueError:
        return False
    return True


_ONE = {int: "a whole number", float: "a number", bool: "True or False", str: "one text"}


def _words(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(kind) is tuple:
        how_many = "any number of values" if arguments[-1] is Ellipsis else f"{len(arguments)} values"
        return f"{how_many}, each {_ONE[arguments[0]]},"
    return _ONE[kind]
