"""The watcher of ranks, with sockets of this process in place of other ranks."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from p828.distributed.connections import LONGEST_GREETING, accept
from p828.distributed.stacks import stacks
from p828.errors import RunFailed
from p828.runs.file_names import HANG_FILE

TOKEN = "secret"
STRANGERS = {
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "garbage": b"\xff\x00\x80{[\n",
    "a list": b"[]\n",
    "another token": b'{"token": "other", "rank": 1}\n',
    "a token that is no text": b'{"token": 5, "rank": 1}\n',
    "half a surrogate": b'{"token": "\\ud800", "rank": 1}\n',
    "deep": b"[" * 4000 + b"\n",
    "a long line": b"x" * (LONGEST_GREETING + 1),
    "nothing": b"",
    "half a line": b'{"token": "sec',
}


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server


def came(server: socket.socket, said: bytes) -> socket.socket:
    connection = socket.create_connection(server.getsockname())
    connection.sendall(said)
    return connection


def greeting(rank: int) -> bytes:
    return json.dumps({"token": TOKEN, "rank": rank}).encode() + b"\n"


def test_strangers_are_turned_away_and_keep_nobody_waiting(server: socket.socket) -> None:
    with ExitStack() as stack:
        strangers = {name: stack.enter_context(came(server, said)) for name, said in STRANGERS.items()}
        came(server, b"").close()
        for rank in (2, 1):
            stack.enter_context(came(server, greeting(rank)))
        peers = accept(server, 3, TOKEN, within=60)
        assert [peer.rank for peer in peers] == [2, 1]
        for name, stranger in strangers.items():
            stranger.settimeout(10)
            with suppress(ConnectionResetError):  # closed as well, with something unread
                assert stranger.recv(1) == b"", name
        for peer in peers:
            peer.connection.close()


def test_a_rank_that_does_not_come_is_named(server: socket.socket) -> None:
    expected = r"waited 0\.5 s for the connections of ranks \[1, 3\]"
    with came(server, greeting(2)), came(server, b"{"), pytest.raises(RunFailed, match=expected):
        accept(server, 4, TOKEN, within=0.5)


def test_stacks_tell_where_every_thread_is() -> None:
    found = stacks()
    assert re.search(r'File ".*test_watchdog\.py", line \d+ in test_stacks_tell_where_every_thread_is', found)
    assert "MainThread" in found.split("\n\n")[-1]


WATCHER = """
import socket, sys, time
from pathlib import Path
del socket.TCP_KEEPIDLE  # which not every system has
from p828.distributed.connections import Peer
from p828.distributed.watchdog import Watchdog
peer = Peer(socket.create_connection(("127.0.0.1", int(sys.argv[2]))), int(sys.argv[1] == "0"))
about = {rank: {"host": "here", "pid": rank} for rank in (0, 1)}
watchdog = Watchdog(int(sys.argv[1]), [peer], about, 0.2, Path(sys.argv[3]))
time.sleep(60)
"""


def watcher(server: socket.socket, rank: int, report: Path, err: int = subprocess.PIPE) -> subprocess.Popen[str]:
    port = str(server.getsockname()[1])
    return subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(rank), port, str(report)], stdout=subprocess.PIPE, stderr=err, text=True
    )


def heard(server: socket.socket, answer: bytes) -> list[dict[str, object]]:
    """What the watcher says to the other rank, which answers its first word, till the connection is closed."""
    connection, _ = server.accept()
    with connection, connection.makefile("rb") as lines:
        first = json.loads(lines.readline())
        connection.sendall(answer)
        return [first, *map(json.loads, lines)]


@pytest.mark.parametrize("kind", ["directory", "fifo", "no directory", "link"])
def test_a_hang_ends_all_ranks_whatever_the_report_is(server: socket.socket, tmp_path: Path, kind: str) -> None:
    report, other = tmp_path / HANG_FILE, tmp_path / "other"
    other.write_text("of someone else")
    if kind == "directory":
        report.mkdir()
    elif kind == "fifo":
        os.mkfifo(report)
    elif kind == "link":
        report.symlink_to(other)
    else:
        report = tmp_path / "none" / HANG_FILE
    with watcher(server, 0, report) as process:
        said = heard(server, json.dumps({"stack": 'Thread 0x1 (M):\n  File "a.py", line 1 in f'}).encode() + b"\n")
        _, err = process.communicate(timeout=60)
    assert said == [{"write_stack": True}, {"end": 1}]
    assert process.returncode == 1
    assert "p828: no progress for 0.2 s; the run ends. Where each rank is" in err
    assert "  rank 1: a.py:1 in f" in err
    assert "Traceback" not in err
    assert ("cannot be written" in err) == (kind in ("directory", "no directory"))
    if "cannot" not in err:
        assert not report.is_symlink()
        assert "line 1 in f" in report.read_text()
    assert other.read_text() == "of someone else"


def test_a_hang_ends_all_ranks_when_nobody_reads_what_they_say(server: socket.socket, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with watcher(server, 0, tmp_path / HANG_FILE, writer) as process:
        os.close(writer)
        said = heard(server, b'{"stack": "-"}\n')
        process.communicate(timeout=60)
    assert said[-1] == {"end": 1}
    assert process.returncode == 1


def test_a_watcher_that_fails_says_so_and_ends_all_ranks(server: socket.socket, tmp_path: Path) -> None:
    with watcher(server, 0, tmp_path / HANG_FILE) as process:
        said = heard(server, b"no JSON\n")
        _, err = process.communicate(timeout=60)
    assert said[-1] == {"end": 1}
    assert process.returncode == 1
    assert "p828: the watcher of rank 0 (here, process 0) failed; the run ends" in err
    assert "JSONDecodeError" in err
