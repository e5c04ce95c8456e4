"""Dataclasses as flags: tyro parses and prints the help, wrong flags are answered in a line."""

import contextlib
import dataclasses
import io
import re
import typing
from typing import Any, TypeVar

import tyro

from p828.config import nearest
from p828.errors import UserError

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], prog: str, default: T | None = None, description: str = "") -> T:
    """An instance of the dataclass `cls` from `--section.key value` flags over `default`.

    `--help` prints every flag with its help, type and default, and exits 0. Raises UserError for an unknown flag,
    naming the nearest one, and for a value of the wrong type.
    """
    if "--help" not in arguments and "-h" not in arguments:
        _check_names(cls, arguments)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
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
        raise UserError(_one_line(complaint.getvalue())) from None


def _check_names(cls: type[Any], arguments: list[str]) -> None:
    known = set(_names(cls, "--"))
    for argument in arguments:
        name = argument.split("=", 1)[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise UserError(f"unknown flag {argument.split('=', 1)[0]}{nearest(name, known)} --help lists all")


def _names(cls: type[Any], prefix: str) -> typing.Iterator[str]:
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from _names(kinds[field.name], name + ".")
        else:
            yield name


def _one_line(box: str) -> str:
    """The first paragraph of the box that tyro draws around its complaint."""
    inside = [line.strip(" │\t") for line in box.splitlines() if line.startswith("│")]
    first = []
    for line in inside:
        if set(line) <= {"─"}:
            break
        first.append(line)
    return re.sub(r"\s+", " ", " ".join(first)) or box.strip()
