import os
import socket
from pathlib import Path

import pytest

from p828.errors import ConfigError
from p828.files import new_file, open_appended, open_regular, write_atomic


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    write_atomic(path, "läuft")
    assert path.read_bytes() == "läuft".encode()
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "x" * 100_000 + "\udc80")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    with pytest.raises(OSError, match=r"egular file|o such device|irectory"):
        open_regular(path)
    with pytest.raises(OSError, match=r"egular file|irectory"):
        open_appended(path)


def test_a_link_is_read_and_not_written(tmp_path: Path) -> None:
    path, target = tmp_path / "link", tmp_path / "target"
    target.write_text("before")
    path.symlink_to(target)
    with open_regular(path) as file:
        assert file.read() == b"before"
    with pytest.raises(OSError, match="is a link"):
        open_appended(path)
    write_atomic(path, "after")
    assert (target.read_text(), path.read_text(), path.is_symlink()) == ("before", "after", False)


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_text("half of a lo")
    write_atomic(tmp_path / "file", "all")
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_is_written_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with new_file(path) as first:
        first.write_text("first")
        with pytest.raises(ConfigError, match="file: another process is writing it"), new_file(path) as second:
            second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(ConfigError, match="file: is there already"), new_file(path):
        pass
    assert os.listdir(path.parent) == ["file"]


def test_a_new_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "new" / "file") as path:
        path.write_text(str(1 / 0))
    too_long = tmp_path / "new" / ("n" * 300)
    with pytest.raises(ConfigError, match="nn cannot be made: File name too long"), new_file(too_long / "file"):
        pass
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_of_a_new_file_goes(tmp_path: Path) -> None:
    left = tmp_path / ".file.tmp"
    left.mkdir()
    (left / "file").write_text("half")
    with new_file(tmp_path / "file") as path:
        path.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert os.listdir(tmp_path) == ["file"]
