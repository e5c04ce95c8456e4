from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from p828.cli.flags import parse, parse_given
from p828.errors import ConfigError


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
        (["--is-on", "maybe"], "--is-on maybe: true or false is accepted"),
        (["--inner.kind", "odd"], "--inner.kind odd: plain or fancy is accepted"),
        (["--inner.betas", "0.1"], "--inner.betas 0.1: 2 values, each a number, is accepted"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_are_answered_in_a_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
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


@pytest.mark.parametrize(
    "given, value",
    [
        (["--is-on"], True),
        (["--is-on", "--steps", "3"], True),
        *((["--is-on", text], text.lower() == "true") for text in ("true", "false", "True", "False")),
        *(([f"--is-on={text}"], text.lower() == "true") for text in ("true", "false", "True", "False")),
        (["--is_on=false"], False),
    ],
)
def test_booleans(given: list[str], value: bool) -> None:
    for default in (Outer(is_on=True), Outer(is_on=False)):
        assert parse(Outer, given, "p", default).is_on == value


@dataclass(frozen=True)
class Speech:
    place: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLACE")]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    name: str = ""
    is_loud: bool = False
    seed: int = 0
    heat: float = 1.0
    words: tuple[str, ...] = ()


@pytest.mark.parametrize("text", ["---", "--", "-", "--help me", "--end--", "-5", "--no such flag", "a --prompt", "-x"])
def test_text_may_begin_with_dashes(text: str) -> None:
    assert parse(Speech, ["here", "--prompt", text, "--seed", "1"], "p").prompt == (text,)
    assert parse(Speech, ["here", "--prompt", text, "--prompt", text], "p").prompt == (text, text)
    assert parse(Speech, ["here", f"--prompt={text}", "--name", text], "p") == Speech("here", (text,), text)


def test_any_text_can_be_given_behind_an_equals_sign() -> None:
    for text in ("--prompt", "--help", "--seed=3", "", "a=b"):
        assert parse(Speech, ["here", f"--prompt={text}"], "p").prompt == (text,)


def test_numbers_may_be_negative() -> None:
    parsed = parse(Speech, ["here", "--seed", "-1", "--heat", "-inf"], "p")
    assert (parsed.seed, parsed.heat) == (-1, float("-inf"))


def test_a_bare_boolean_takes_no_positional() -> None:
    assert parse(Speech, ["--is-loud", "here"], "p") == Speech("here", is_loud=True)


def test_what_was_given_is_told_apart_from_defaults() -> None:
    _, given = parse_given(Outer, ["--steps", "7", "--inner.width=3"], "p")
    assert given == {"steps": 7, "inner.width": 3}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no PLACE given"),
        (["here", "there"], "'there' stands where a flag comes"),
        (["here", "--prompt"], "--prompt: "),
        (["here", "--prompt", "--seed", "1"], "--prompt: "),
        (["here", "--name", "--sed", "1"], "unknown flag --sed; did you mean --seed?"),
        (["here", "--words", "a", "--zzz"], "unknown flag --zzz."),
        (["here", "--seed", "1" * 5000], "--seed '1111"),
        (["here", "--seed", "1", "2"], "'2' stands where a flag comes"),
        (["here", "-n", "3"], "unknown flag -n."),
        (["here", "--" + "z" * 5000], "unknown flag "),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(Speech, arguments, "p")
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)
