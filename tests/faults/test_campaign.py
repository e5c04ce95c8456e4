"""Many faults of each kind, at random: few in the tests, with `make faults` as many as docs/reliability.md tells."""

import dataclasses
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p828.cli.main import dispatch
from p828.config import Config, load
from p828.config.values import flatten
from p828.runs import checkpoint
from p828.verify.kill_resume import KillResumeCheck, shortened
from runs import in_process, tiny_values, write_toml
from shim import Shim


def counts(short: int, campaign: int) -> Any:
    """For a test that has a number of faults as its parameter."""
    return pytest.mark.parametrize("count", [short, pytest.param(campaign, marks=pytest.mark.long)])


@pytest.mark.long
def test_kills(tmp_path: Path, shim: Shim, capsys: pytest.CaptureFixture[str]) -> None:
    """At random moments, a third of them while a checkpoint is written, which takes its time on a slow disk."""
    count = 50
    path = write_toml(tmp_path, model={"dropout": 0.1}, evaluation={"every": 0})
    shim(file=".tmp/", delay=40_000)
    config = shortened(dataclasses.replace(load(str(path)), name="killed"), tmp_path)
    steps = {"train": dataclasses.replace(config.train, steps=12 * count)}
    every = {"checkpoint": dataclasses.replace(config.checkpoint, every=5)}
    proof = KillResumeCheck(dataclasses.replace(config, **steps, **every), tmp_path, kills=count)
    proof.run()
    assert proof.difference() is None
    assert proof.killed >= 0.9 * count
    assert proof.kills_while_saving > 0
    with capsys.disabled():
        print(
            f"\n{proof.killed} kills, {proof.kills_while_saving} of them while a checkpoint was written: the same bits"
        )


@counts(20, 200)
def test_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    """Every damaged checkpoint is named and quarantined, and the one before is used."""
    path = write_toml(tmp_path, checkpoint={"every": 6, "keep_last": 2})
    assert in_process("train", str(path), cwd=tmp_path)[0] == 0
    whole, draw, kinds = tmp_path / "runs" / "tiny" / "checkpoints", random.Random(0), Counter[str]()
    before, newest = sorted(whole.iterdir())
    for number in range(count):
        copied = tmp_path / f"damage-{number}"
        shutil.copytree(whole, copied)
        damaged = draw.choice(sorted((copied / newest.name).iterdir()))
        kinds[_damage(damaged, draw)] += 1
        found, notes = checkpoint.find_newest(copied)
        assert found == copied / before.name
        assert len(notes) == 1
        assert damaged.name in notes[0]
        assert f"quarantined as damaged_{newest.name}" in notes[0]
        shutil.rmtree(copied)
    with capsys.disabled():
        print(f"\n{count} damaged checkpoints, all found: {dict(kinds)}")


def _damage(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = draw.choice(["bit", "byte", "cut", "longer", "gone"])
    at = draw.randrange(len(content))
    if kind == "bit":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        content[at] = (content[at] + draw.randrange(1, 256)) % 256
    elif kind == "cut":
        del content[at:]
    elif kind == "longer":
        content += draw.randbytes(draw.randrange(1, 100))
    path.unlink()
    if kind != "gone":
        path.write_bytes(content)
    return kind


@counts(60, 300)
def test_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """One thing is wrong in each: a line or two that name it, exit code 2, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    valid, draw = tiny_values(tmp_path), random.Random(0)
    inside = set(tmp_path.iterdir())
    for _ in range(count):
        text, name = draw.choice(WRONG)(valid, draw)
        (tmp_path / "wrong.toml").write_text(text)
        assert dispatch(["train", "wrong.toml"]) == 2, text
        said = capsys.readouterr()
        assert not said.out
        assert len(said.err.splitlines()) <= 2
        assert name in said.err, text
    assert set(tmp_path.iterdir()) == inside | {tmp_path / "wrong.toml"}
    with capsys.disabled():
        print(f"\n{count} wrong configurations, each answered with a line and exit code 2")


Wrong = Callable[[dict[str, dict[str, Any]], random.Random], tuple[str, str]]
"""A text of a wrong configuration, and what an answer must name."""


def _with(valid: dict[str, dict[str, Any]], key: str, value: Any) -> str:
    section, _, name = key.partition(".")
    if "." in name:
        inner, _, name = name.partition(".")
        own = {**valid.get(section, {}), inner: {**valid.get(section, {}).get(inner, {}), name: value}}
    else:
        own = {**valid.get(section, {}), name: value}
    return tomli_w.dumps({**valid, section: own})


def _keys(kind: type) -> list[str]:
    return [key for key, value in flatten(Config()).items() if "." in key and type(value) is kind]


def _another_type(valid: dict[str, dict[str, Any]], draw: random.Random) -> tuple[str, str]:
    kind, others = draw.choice([
        (int, ["many", 1.5, True, [1]]), (float, ["much", True, []]), (bool, ["yes", 1, 0.0]), (str, [7, False, ["a"]]),
    ])  # fmt: skip
    key = draw.choice(_keys(kind))
    return _with(valid, key, draw.choice(others)), key


def _out_of_range(valid: dict[str, dict[str, Any]], draw: random.Random) -> tuple[str, str]:
    kind, beyond = draw.choice([(int, [-1, -(10**6), 2**31, 10**30]), (float, [-0.5, float("inf"), float("nan")])])
    key = draw.choice(_keys(kind))
    return _with(valid, key, draw.choice(beyond)), key


def _mistyped(valid: dict[str, dict[str, Any]], draw: random.Random) -> tuple[str, str]:
    key = draw.choice([key for key in flatten(Config()) if "." in key])
    at = draw.randrange(key.index(".") + 1, len(key))
    wrong = draw.choice([key[:at] + "_x" + key[at:], key[:at] + "q" + key[at + 1 :], key + "s2"])
    return _with(valid, wrong, 1), wrong.split(".")[1]


def _no_toml(valid: dict[str, dict[str, Any]], draw: random.Random) -> tuple[str, str]:
    lines = tomli_w.dumps(valid).splitlines()
    at = draw.randrange(len(lines))
    broken = draw.choice(["= 1", "[", "a =", 'a = "', "a = [1, ", "[[model]", "\x00", "a = 1 = 2", "a = 01"])
    return "\n".join([*lines[:at], broken, *lines[at:]]), "wrong.toml: cannot be read as TOML"


WRONG: list[Wrong] = [_another_type, _out_of_range, _mistyped, _no_toml]
