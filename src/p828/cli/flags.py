"""Dataclasses as flags: parsed here, so that what is wrong is answered in a line; tyro prints the help."""

import dataclasses
import re
import sys
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from p828.cli.flag_names import suggestion
from p828.config.facts import fields_of
from p828.config.old_names import old_names
from p828.config.values import changed, shown
from p828.distributed.launcher import report_once
from p828.errors import ConfigError

T = TypeVar("T")
HELP = ("-h", "--help")
CLOSE = 0.85  # similarity from which an argument with a dash is a misspelt flag, and not the text of the flag before it
FLAG = re.compile(r"--?[A-Za-z][\w.-]*(=.*)?", re.DOTALL)
BOOLEANS = {"true": True, "false": False, "True": True, "False": False}


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
    taken out before, for the suggestion. Raises ConfigError for an unknown flag, naming the nearest one, and for a
    value of the wrong type.
    """
    return parse_given(cls, arguments, prog, default, description, others)[0]


def parse_given(
    cls: type[T],
    arguments: list[str],
    prog: str,
    default: T | None = None,
    description: str = "",
    others: tuple[str, ...] = (),
    is_again: bool = False,
) -> tuple[T, dict[str, Any]]:
    """As `parse`, and what was given: dotted key to value.

    A flag's old name is taken as well, with a warning unless these arguments were parsed before (`is_again`). A flag
    takes the arguments behind it up to the next one. A flag for text takes one that begins with a dash, too, if
    it is no flag's name; whatever it is, it can be given as `--flag=text`.
    """
    kinds = dict(_flags(cls, "--"))
    words = _Words(kinds, [*kinds, *others, *HELP], len(list(_positional_fields(cls))), dict(_old_flags(cls, "--")))
    words.sort(arguments)
    if words.is_help:
        _print_help(cls, prog, default, description)
    if not is_again:
        report_once(f"{old} is now {words.old_flags[old]}" for old in words.used_old_flags)
    given = {_key(name): _value(name, kinds[name], words.values[name]) for name in words.values}
    given.update(_positionals(cls, words.positionals, default, description))
    if default is None:
        required = {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}  # type: ignore[arg-type]
        default = cls(**required)
    return changed(default, given), given


@dataclass
class _Words:
    """A command line, sorted into flags and what stands behind each."""

    kinds: Mapping[str, Any]
    known: Collection[str]
    most_positionals: int
    old_flags: Mapping[str, str]
    """Old name to today's."""
    used_old_flags: dict[str, None] = field(default_factory=dict)
    """In the order in which they came."""
    values: dict[str, list[str]] = field(default_factory=dict)
    positionals: list[str] = field(default_factory=list)
    is_help: bool = False
    _due: bool = False
    """Whether the flag that came last has no value yet."""

    def sort(self, arguments: list[str]) -> None:
        self.is_help = any(argument in HELP for argument in arguments)
        flag = ""
        for argument in arguments:
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            if name in self.old_flags:
                self.used_old_flags[name] = None
                name = self.old_flags[name]
            if name in self.kinds and not argument.startswith("---"):
                self._check_due(flag)
                flag = name
                is_repeated = _is_repeated(self.kinds[flag]) and flag in self.values
                self.values[flag] = [*(self.values[flag] if is_repeated else []), *([value] if equals else [])]
                self._due = not equals
            elif argument in HELP:
                continue
            elif self._is_value(flag, argument, name):
                self.values[flag].append(argument)
                self._due = False
            elif argument.startswith("-") and FLAG.fullmatch(argument):
                if not self.is_help:
                    raise ConfigError(f"unknown flag {shown_word(name)}{suggestion(name, self.known)} --help lists all")
            else:
                self.positionals.append(argument)
        self._check_due(flag)

    def _check_due(self, flag: str) -> None:
        """Raises ConfigError if a flag that is given once for each text has none."""
        if flag and self._due and not self.is_help:
            kind = self.kinds[flag]
            if _is_repeated(kind) and not _is_counter(kind):
                raise ConfigError(f"{flag}: one text is accepted, again with each {flag}")

    def _is_value(self, flag: str, argument: str, name: str) -> bool:
        """Whether an argument that is no flag's name belongs to the flag before it."""
        if not flag:
            return False
        kind, is_many = self.kinds[flag], _is_list(self.kinds[flag])
        if _is_counter(kind):
            return False
        is_bare = _bare(kind) is bool and argument not in BOOLEANS
        if is_bare and len(self.positionals) < self.most_positionals:
            return False
        if not self._due and not is_many:
            return False
        if not (argument.startswith("-") and FLAG.fullmatch(argument)):
            return True
        if argument[1:2] != "-":  # `-inf`, `-x`
            return self._due
        return self._due and _takes_text(kind) and suggestion(name, self.known, CLOSE) == "."


def _print_help(cls: type[T], prog: str, default: T | None, description: str) -> typing.NoReturn:
    tyro.cli(
        cls,
        args=["--help"],
        prog=prog,
        description=description,
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.FlagConversionOff,),
    )
    sys.exit(0)


def _positionals(cls: type[Any], given: list[str], default: Any, description: str) -> dict[str, str]:
    """The values of the fields that stand without a flag. Raises ConfigError for one too few or too many."""
    fields = list(_positional_fields(cls))
    found = {name: value for (name, _), value in zip(fields, given, strict=False)}
    if len(given) > len(fields):
        raise ConfigError(f"{shown(given[len(fields)])} stands where a flag comes, as --section.key VALUE")
    if len(given) < len(fields) and default is None:
        _, metavar = fields[len(given)]
        raise ConfigError(f"no {metavar} given. {_usage(description)}")
    return found


def _usage(description: str) -> str:
    return f"Usage: {description.splitlines()[0]}" if description else "--help says more"


def _positional_fields(cls: type[Any]) -> Iterator[tuple[str, str]]:
    """Name of the field, and of what it takes, in the order in which they are given."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    for own in dataclasses.fields(cls):
        markers = _markers(kinds[own.name])
        if tyro.conf.Positional in markers:
            metavars = [marker.metavar for marker in markers if getattr(marker, "metavar", None)]
            yield own.name, metavars[0] if metavars else own.name.upper()


def _flags(cls: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every flag with its type, which may be annotated."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    for own in dataclasses.fields(cls):
        name, kind = prefix + own.name.replace("_", "-"), kinds[own.name]
        markers = _markers(kind)
        if tyro.conf.Positional in markers or tyro.conf.Suppress in markers:
            continue
        if dataclasses.is_dataclass(_bare(kind)):
            yield from _flags(typing.cast(type, _bare(kind)), name + ".")
        else:
            yield name, kind


def _old_flags(cls: type[Any], prefix: str) -> Iterator[tuple[str, str]]:
    """The old name of every flag that has one, and today's."""
    for old, new in old_names(cls).items():
        yield prefix + old.replace("_", "-"), prefix + new.replace("_", "-")
    for own, section in fields_of(cls):
        if section is not None:
            yield from _old_flags(section, f"{prefix}{own.name.replace('_', '-')}.")


def _bare(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _markers(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__metadata__", ())


def _is_counter(kind: Any) -> bool:
    return tyro.conf.UseCounterAction in _markers(kind)


def _is_repeated(kind: Any) -> bool:
    """Whether a flag that is given again adds to what was given."""
    return _is_counter(kind) or tyro.conf.UseAppendAction in _markers(kind)


def _is_list(kind: Any) -> bool:
    """Whether it takes several arguments at once."""
    return typing.get_origin(_bare(kind)) is tuple and not _is_repeated(kind)


def _takes_text(kind: Any) -> bool:
    bare = _bare(kind)
    return bare is str or (typing.get_origin(bare) is tuple and typing.get_args(bare)[0] is str)


def _key(name: str) -> str:
    """`--section.some-key` to `section.some_key`."""
    return name.removeprefix("--").replace("-", "_")


def _value(name: str, kind: Any, given: list[str]) -> Any:
    """The value of a flag's type. Raises ConfigError."""
    if _is_counter(kind):
        if given:
            raise ConfigError(f"{name} {shown_word(given[0])}: no value is accepted")
        return 1
    kind = _bare(kind)
    if kind is bool and not given:
        return True
    try:
        return _converted(kind, given)
    except ValueError:
        words = f"{name} {shown_word(' '.join(given))}".rstrip()
        raise ConfigError(f"{words}: {_words(kind)} is accepted") from None


def _converted(kind: Any, given: list[str]) -> Any:
    """Raises ValueError if these are no value, or not as many values, as the type has."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        is_any = arguments[-1] is Ellipsis
        if not is_any and len(given) != len(arguments):
            raise ValueError
        return tuple(_converted(arguments[0], [value]) for value in given)
    if len(given) != 1:
        raise ValueError
    if typing.get_origin(kind) is Literal:
        if given[0] not in arguments:
            raise ValueError
        return given[0]
    if kind is bool:
        if given[0] not in BOOLEANS:
            raise ValueError
        return BOOLEANS[given[0]]
    return kind(given[0])


_ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "one text"}


def _words(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(kind) is tuple:
        how_many = "any number of values" if arguments[-1] is Ellipsis else f"{len(arguments)} values"
        return f"{how_many}, each {_ONE[arguments[0]]},"
    return _ONE[kind]


def shown_word(text: str) -> str:
    """A word of the command line, short enough for a line."""
    return text if text.isprintable() and len(text) <= 80 else shown(text)
