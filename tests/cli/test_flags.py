from dataclasses import dataclass, field
from typing import Literal

import pytest
import tyro

from p828.cli.flags import parse
from p828.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: int = 3
    """Width of it."""
    betas: tuple[float, float] = (0.9, 0.95)
    names: tuple[str, ...] = ()
    kind: Literal["plain", "fancy"] = "plain"


@dataclass(frozen=True)
class Outer:
    steps: int = 7
    is_on: bool = True
    inner: Inner = field(default_factory=Inner)
    loud: tyro.conf.UseCounterAction[int] = 0


def test_flags_override_the_default_and_take_both_spellings() -> None:
    default = Outer(steps=9, inner=Inner(width=5))
    assert parse(Outer, [], "p", default) == default
    arguments = ["--inner.names", "a", "b", "--is_on", "False", "--inner.betas", "0.1", "0.2", "--loud"]
    parsed = parse(Outer, arguments, "p", default)
    assert parsed == Outer(9, False, Inner(5, (0.1, 0.2), ("a", "b")), 1)
    assert parse(Outer, ["--steps=3"], "p").steps == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stepz", "3"], "unknown flag --stepz; did you mean --steps?"),
        (["--zzz", "3"], "unknown flag --zzz. --help lists all"),
        (["--dry-rnu"], "unknown flag --dry-rnu; did you mean --dry-run?"),
        (["--steps", "x"], "--steps x: a whole number is accepted"),
        (["--steps=x"], "--steps x: a whole number is accepted"),
        (["--steps"], "--steps: a whole number is accepted"),
        (["--loud", "--steps", "x"], "--steps x: a whole number is accepted"),
        (["--is-on", "maybe"], "--is-on maybe: True or False is accepted"),
        (["--inner.kind", "odd"], "--inner.kind odd: plain or fancy is accepted"),
        (["--inner.betas", "0.1"], "--inner.betas 0.1: 2 values, each a number, is accepted"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_are_answered_in_a_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(Outer, arguments, "p", others=("--dry-run",))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_help_lists_every_flag_with_help_type_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Outer, ["--help"], "p", Outer(steps=9))
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("--steps INT", "(default: 9)", "--inner.width INT", "Width of it.", "{plain,fancy}"):
        assert part in said
