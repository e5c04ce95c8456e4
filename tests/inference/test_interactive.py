"""`p828 generate --interactive` at a terminal, and the history of what was typed."""

import fcntl
import json
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from saved_run import save_run

from p828.cli.generation.line_history import KEPT_BYTES, LineHistory
from p828.cli.generation.terminal import typed_lines
from p828.data.tokenizer.tokenizer import Tokenizer
from tiny import tiny_model

PROMPT = "\x1b[?2004h"  # what is pasted is to be marked: a line is awaited
ENTERED = "\x1b[?2004l"  # and no more
WHERE_IS_THE_CURSOR, TOP_LEFT = b"\x1b[6n", b"\x1b[1;1R"


class Terminal:
    """A process at a terminal of 40 columns, and what stands on it so far."""

    def __init__(self, process: int, file: int) -> None:
        self.process, self._file = process, file
        self.text = ""
        fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self._file, text)

    def read_to(self, text: str) -> str:
        """What comes up to a text, for a minute at most; all of it at the process's end for one that never comes."""
        end = time.monotonic() + 60
        while text not in self.text and time.monotonic() < end:
            if select.select([self._file], [], [], 0.1)[0]:
                try:
                    found = os.read(self._file, 2**16)
                except OSError:  # the process has ended
                    break
                if WHERE_IS_THE_CURSOR in found:
                    self.type(TOP_LEFT)
                self.text += found.decode(errors="replace")
        before, separator, self.text = self.text.partition(text)
        assert separator or text == "\0", before[-500:]
        return before


@contextmanager
def at_terminal(*arguments: str, state: Path) -> Iterator[Terminal]:
    process, file = pty.fork()
    if process == 0:
        os.environ.update(OMP_NUM_THREADS="1", TERM="xterm", XDG_STATE_HOME=str(state))
        os.execv(sys.executable, [sys.executable, "-m", "p828", *arguments])
    try:
        yield Terminal(process, file)
    finally:
        os.close(file)


def test_a_session_at_a_terminal(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Ctrl-C ends an answer that would take minutes, and not the program; Ctrl-D ends that."""
    model = tiny_model(vocab_size=288, max_position_embeddings=200_000)
    with torch.no_grad():
        model.head_weight[byte_level.eos_id] = 0
    run = save_run(tmp_path / "run", model, byte_level)
    endless = ["--interactive", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "199000"]
    with at_terminal("generate", str(run), *endless, state=tmp_path / "state") as terminal:
        terminal.read_to(PROMPT)
        terminal.type(b"the cat\r")
        terminal.read_to(ENTERED)
        terminal.read_to("the")  # which this model says before long
        terminal.type(b"\x03")
        terminal.read_to("p828: stopped\r\n")
        terminal.read_to(PROMPT)
        terminal.read_to("context ")
        terminal.type(b"\xff\r")
        terminal.read_to("is not valid Unicode text")
        terminal.read_to(PROMPT)
        terminal.type(b"dog\x03")
        terminal.read_to(PROMPT)
        terminal.type(b"\x03")
        terminal.read_to("p828: Ctrl-D ends")
        terminal.read_to(PROMPT)
        terminal.type(b"\x04")
        assert "tokens/s, first token after" in terminal.read_to("\0")
        assert os.waitstatus_to_exitcode(os.waitpid(terminal.process, 0)[1]) == 0
    history = tmp_path / "state" / "p828" / "generate_history.jsonl"
    assert [json.loads(line) for line in history.read_text().splitlines()] == ["the cat", "\udcff"]
    assert history.stat().st_mode & 0o777 == 0o600


def typed(keys: str) -> list[str]:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text(keys)
        return list(typed_lines(lambda: ""))


def test_lines_of_earlier_days_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert typed("first\rsecond\r\x04") == ["first", "second"]
    up = "\x1b[A"
    assert typed(f"{up}{up}!\r\x04") == ["first!"]
    assert typed(f"{up}?\r\x04") == ["first!?"]
    history = tmp_path / "p828" / "generate_history.jsonl"
    with history.open("ab") as file:
        file.write(b'[1]\n\xff\n"cut o')  # what is no line of text is passed over
    assert list(LineHistory().load_history_strings()) == ["first!?", "first!", "second", "first"]


def test_what_is_typed_may_have_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a terminal sends what is pasted."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert typed("\x1b[200~a\nb\x1b[201~\r\x04") == ["a\nb"]
    assert list(LineHistory().load_history_strings()) == ["a\nb"]


def test_colours_that_are_typed_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a terminal sends what is pasted, if it does not mark that. prompt_toolkit takes them for moves of a mouse."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert typed("a \x1b[31mred\x1b[0m and a \x1b[1;34mblue\x1b[0m cat\r\x04") == ["a red and a blue cat"]


def test_a_long_history_loses_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = tmp_path / "p828" / "generate_history.jsonl"
    history.parent.mkdir()
    lines = [f"{number} {'x' * 100}" for number in range(11_000)]
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = list(LineHistory().load_history_strings())[::-1]
    assert kept == lines[-len(kept) :]
    assert KEPT_BYTES - 200 < history.stat().st_size <= KEPT_BYTES
    assert list(LineHistory().load_history_strings())[::-1] == kept


def test_without_a_place_for_it_there_is_no_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert typed("first\rsecond\r\x04") == ["first", "second"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"p828: what is typed is not kept for another day: {tmp_path}/file/p828/generate_history")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "p828").mkdir()
    os.mkfifo(tmp_path / "p828" / "generate_history.jsonl")
    assert typed("first\r\x04") == ["first"]
    assert "not a regular file" in capsys.readouterr().err
