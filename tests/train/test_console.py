import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import rich.console

from p828.train.log.console import Console, say

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def output(width: int, terminal: bool) -> tuple[rich.console.Console, io.StringIO]:
    file = io.StringIO()
    return rich.console.Console(file=file, width=width, force_terminal=terminal, color_system=None, _environ={}), file


def shown(file: io.StringIO) -> list[str]:
    """What was drawn, without cursor movements."""
    return CONTROL.sub("", file.getvalue()).replace("\r", "\n").split("\n")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_fits_and_shows_everything(tmp_path: Path, width: int) -> None:
    console, file = output(width, terminal=True)
    clock = Clock()
    with Console(tmp_path, 100_000, first_step=99_000, output=console, clock=clock) as view:
        for step in (99_001, 99_002, 99_999):
            clock.now += 120.0
            view.step(step, loss=10.81234, tokens_per_second=123_456.0)
        view.evaluation(99_999, loss=3.2, perplexity=24.5325, best=True)
    assert shown(file)[0].startswith("99000/100000 ━━")
    bar = shown(file)[-2]
    assert len(bar) == width
    assert bar.startswith("99999/100000 ━━")
    assert bar.endswith("99%  loss 10.812  123k tok/s  0:01 left")
    assert "step 99999: validation loss 3.2000, perplexity 24.53 (best)" in shown(file)
    assert max(map(len, shown(file))) == width


def test_time_left_follows_the_speed_since_the_resume(tmp_path: Path) -> None:
    console, file = output(80, terminal=False)
    clock = Clock()
    with Console(tmp_path, 1000, first_step=900, output=console, clock=clock) as view:
        for step in range(901, 992):
            clock.now += 90.0 if step == 901 else 2.0  # the first step compiles
            view.step(step, 1.0, 5.0)
    assert shown(file)[-2] == "step 991/1000 (99%)  loss 1.000  5 tok/s  0:18 left"


def test_plain_lines_come_by_steps_and_by_time(tmp_path: Path) -> None:
    console, file = output(80, terminal=False)
    clock = Clock()
    with Console(tmp_path, 100, output=console, clock=clock) as view:
        for step in range(1, 101):
            clock.now += 30.0 if 50 < step <= 60 else 0.1
            view.step(step, 1.0, 5.0)
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in shown(file) if line]
    fast = [*range(1, 50, 5), 51]
    assert steps == [*fast[:-1], 51, 53, 55, 57, 59, *range(64, 100, 5), 100]
    assert "\x1b" not in file.getvalue()


def test_everything_is_in_the_log_with_its_time(tmp_path: Path) -> None:
    for terminal in (True, False):
        console, _ = output(40, terminal)
        with Console(tmp_path, 10, output=console) as view:
            view.print("first\nsecond [bold]" + "long " * 20)
            view.event("a step was \x1b[2J skipped")
            view.step(1, 2.0, 3.0)
            view.samples([("def f(", "x):\n\treturn")])
    written = (tmp_path / "log.txt").read_text().splitlines()
    texts = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ?", "", line) for line in written]
    run = [
        "first",
        ("second [bold]" + "long " * 20).rstrip(),
        r"a step was \x1b[2J skipped",
        "step 1/10 (10%)  loss 2.000  3 tok/s  -:-- left",
        "", "> def f(", "| x):", "|     return", "",
    ]  # fmt: skip
    assert texts == run + run


HOSTILE = [
    "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x9b31m", "\rover", "\b\b", "\x00", "\x7f", "\u202egnp", "\u2028", "\ufeff",
    "\ud800", "[red]x[/red]", "[/nothing]", ":smile:",
]  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("text", HOSTILE)
def test_a_sample_cannot_steer_the_terminal(tmp_path: Path, text: str, terminal: bool) -> None:
    """Only printable characters of the text reach the output; the harmless ones are the reference for the rest."""

    def drawn(sample: str, run: str) -> str:
        console, file = output(80, terminal)
        with Console(tmp_path / run, 10, output=console) as view:
            view.samples([(sample, sample)])
            view.print(sample)
            view.event(sample)
        return file.getvalue()

    spelt = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    assert drawn(text, "a") == drawn(spelt, "b")
    assert spelt in CONTROL.sub("", drawn(text, "c"))
    assert all(char.isprintable() or char == "\n" for char in (tmp_path / "a" / "log.txt").read_text())


def test_prompt_and_continuation_are_told_apart_and_wrapped(tmp_path: Path) -> None:
    console, file = output(20, terminal=False)
    with Console(tmp_path, 10, output=console) as view:
        view.samples([("def f(\n  x", "):\n> not a prompt\n" + "word " * 6), ("empty", "")])
    assert [line.rstrip() for line in shown(file)] == [
        "", "> def f(", ">   x", "| ):", "| > not a prompt", "| word word word", "| word word word",
        "", "> empty", "|", "", "",
    ]  # fmt: skip


def test_an_output_of_another_encoding_takes_any_text(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding="ascii")
    with Console(tmp_path, 10, output=rich.console.Console(file=file, force_terminal=False)) as view:
        view.print("é")
        view.samples([("日本", "🙂")])
        view.step(1, 1.0, 1.0)
    file.flush()
    assert b"\\xe9\n" in buffer.getvalue()
    assert "日本" in (tmp_path / "log.txt").read_text(encoding="utf-8")


AT_A_TERMINAL = """
import os, signal, sys
from pathlib import Path
from p828.train.log.console import Console, say
with Console(Path(sys.argv[1]), 10) as view:
    view.step(1, 1.0, 2.0)
    print("from elsewhere")
    if sys.argv[2] == "exception":
        raise RuntimeError("ours")
    if sys.argv[2] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
"""


def at_a_terminal(run_dir: Path, way: str, **environment: str) -> str:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL, str(run_dir), way],
        stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(terminal)
    drawn = b""
    try:
        while block := os.read(main, 65536):
            drawn += block
    except OSError:  # how Linux reports the other end closed
        pass
    os.close(main)
    child.wait()
    return drawn.decode()


@pytest.mark.parametrize("way", ["normal", "exception", "interrupt"])
def test_the_cursor_comes_back(tmp_path: Path, way: str) -> None:
    drawn = at_a_terminal(tmp_path, way)
    assert drawn.count("\x1b[?25l") == 1
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")
    assert "from elsewhere" in drawn


def test_a_dumb_terminal_and_a_pipe_get_plain_lines(tmp_path: Path) -> None:
    line = "step 1/10 (10%)  loss 1.000  2 tok/s  -:-- left"
    assert at_a_terminal(tmp_path, "normal", TERM="dumb").splitlines() == [line, "from elsewhere"]
    piped = subprocess.run(
        [sys.executable, "-c", AT_A_TERMINAL, str(tmp_path), "normal"],
        capture_output=True, text=True, check=True, env={**os.environ, "FORCE_COLOR": "1"},
    )  # fmt: skip
    assert piped.stdout.splitlines() == [line, "from elsewhere"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [40, 80])
def test_a_preview_is_one_line_a_sample(tmp_path: Path, width: int, terminal: bool) -> None:
    console, file = output(width, terminal)
    with Console(tmp_path, 10, output=console) as view:
        view.preview([("def f(", "x):\n\n    return\tx\x1b[2J"), ("class ", "A" * 200)])
    lines = [line for line in shown(file) if line.startswith("  ")]
    assert [line.rstrip() for line in lines] == [
        "  def f(x): ⏎ return    x\\x1b[2J",
        "  class " + "A" * (width - 9) + "…",
    ]


def test_the_loss_that_is_shown_is_a_mean_of_the_last_steps(tmp_path: Path) -> None:
    console, file = output(80, terminal=False)
    with Console(tmp_path, 40, output=console, clock=Clock()) as view:
        for step in range(1, 41):
            view.step(step, loss=float(step % 2), tokens_per_second=1.0)
        view.step(40, loss=float("nan"), tokens_per_second=1.0)
        view.evaluation(40, loss=1e30, perplexity=float("inf"), best=False)
    said = shown(file)
    assert all("loss 0.5" in line for line in said if line.startswith(("step 11/", "step 21/", "step 31/")))
    assert "loss nan" in said[-3]
    assert said[-2] == "step 40: validation loss 1e+30, perplexity inf"


def test_the_bar_moves_within_a_step(tmp_path: Path) -> None:
    console, file = output(60, terminal=True)
    clock = Clock()
    with Console(tmp_path, 4, output=console, clock=clock) as view:
        for number in range(1, 9):
            clock.now += 5.0
            view.micro_batch(number, 8)
            view._bar.refresh()  # as its thread does
        view.step(1, 2.0, 3.0)
    bars = [line for line in shown(file) if "/4 " in line]
    lengths = [line.count("━") for line in bars[:-1]]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3
    assert [line[:4] for line in bars] == ["0/4 "] * (len(bars) - 1) + ["1/4 "]
    assert bars[4].endswith("0%  micro-batch 4/8")


def test_a_long_step_without_a_bar_is_reported(tmp_path: Path) -> None:
    console, file = output(60, terminal=False)
    clock = Clock()
    with Console(tmp_path, 4, output=console, clock=clock) as view:
        for number in range(1, 17):
            clock.now += 38.0
            view.micro_batch(number, 16)
    told = [1, 3, 5, 7, 9, 11, 13, 15]
    assert shown(file)[:-1] == [f"step 1: micro-batch {number} of 16" for number in told]


def test_a_wait_is_reported_while_it_lasts(tmp_path: Path) -> None:
    console, file = output(60, terminal=False)
    with Console(tmp_path, 4, output=console) as view:
        with view.waiting("opening the data", after=0.0):
            while "opening the data" not in file.getvalue():
                pass
        with view.waiting("never"):
            pass
    assert shown(file) == ["opening the data", ""]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_block_fits_60_columns(tmp_path: Path, terminal: bool) -> None:
    console, file = output(60, terminal)
    long = "/data/books/*.txt " * 4 + "and 97 more: about 1.23 B tokens, 0.4 epochs in this run"
    with Console(tmp_path, 4, output=console) as view:
        view.block("mine", [("model", "0.9 M parameters"), ("data", long), ("directory", "/a" * 40)])
    lines = [line.rstrip() for line in shown(file)]
    start = lines.index("mine")
    assert lines[start + 1] == "  model      0.9 M parameters"
    assert lines[start + 2].startswith("  data       /data/books/*.txt /data/books/*.txt")
    assert lines[start + 3].startswith(" " * 13 + "/data")
    assert max(map(len, lines[start:])) <= 60
    assert "".join(line[13:] for line in lines if "/a/a" in line) == "/a" * 40


def test_a_line_where_output_is_kept_in_memory() -> None:
    kept = io.StringIO()  # which has no encoding
    with contextlib.redirect_stdout(kept):
        say("né: loading")
    assert kept.getvalue() == "né: loading\n"


def test_numbers_that_are_asked_for_are_shown_by_name(tmp_path: Path) -> None:
    console, file = output(80, terminal=False)
    with Console(tmp_path, 2, output=console, clock=Clock()) as view:
        view.step(2, 3.0, 5.0, grad_norm=0.51239, largest_bias=1e-5)
    assert shown(file)[0].startswith("step 2/2 (100%)  loss 3.000  grad_norm 0.5124  largest_bias 1e-05  5 tok/s")
