"""The lines that were typed before, kept in a file that only the user can read."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from p828.errors import reason, warn
from p828.files import open_appended, read_limited, write_atomic

MOST_BYTES = 2**22  # of the file that is read
KEPT_BYTES = 2**20  # of its end, where it has become longer
FILE = "p828/generate_history.jsonl"


def history_file() -> Path:
    """In the user's directory for what programs keep (XDG base directories)."""
    given = os.environ.get("XDG_STATE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state") / FILE


class LineHistory(History):
    """A line of JSON for each line that was typed. Where the file cannot be used, a line says so, and none is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._file: Path | None = None
        try:
            self._file = history_file()
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._earlier = self._read(self._file)
        except (OSError, ValueError, RuntimeError) as error:
            self._earlier = []
            self._give_up(error)

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._earlier)

    def store_string(self, string: str) -> None:
        if self._file is None:
            return
        try:
            with open_appended(self._file) as file:
                file.write(json.dumps(string).encode() + b"\n")
        except OSError as error:
            self._give_up(error)

    def _read(self, path: Path) -> list[str]:
        """The lines of the file, and a shorter file where it has become long. Raises OSError and ValueError."""
        open_appended(path).close()  # so that one that cannot be written is found before a line is typed
        content = read_limited(path, MOST_BYTES)
        lines = content.splitlines(keepends=True)
        if len(content) > KEPT_BYTES:
            lines = content[-KEPT_BYTES:].splitlines(keepends=True)[1:]
            write_atomic(path, b"".join(lines).decode("ascii", "replace"))
        os.chmod(path, 0o600)
        return [text for line in lines if isinstance(text := _parsed(line), str)]

    def _give_up(self, error: Exception) -> None:
        warn(f"what is typed is not kept for another day: {self._file or FILE}: {reason(error)}")
        self._file = None


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
