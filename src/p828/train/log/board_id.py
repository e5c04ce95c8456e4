"""The id by which a tracker knows a run, kept in the run's directory so that a resume continues the same board."""

import os
import re
import uuid
from pathlib import Path

from p828.errors import ConfigError
from p828.files import read_limited, write_atomic

LONGEST_ID = 128  # bytes


def board_id(path: Path, tracker: str) -> str:
    """The id in the file, which is made if need be. Raises ConfigError if it holds none."""
    try:
        if not os.path.lexists(path):
            write_atomic(path, uuid.uuid4().hex[:12] + "\n")
        found = read_limited(path, LONGEST_ID).decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read or written: {error.strerror or error}") from None
    except ValueError:
        found = ""
    if not re.fullmatch(r"[\w.-]+", found):
        raise ConfigError(f"{path}: holds no id of a {tracker} run; remove the file to begin a new one there")
    return found
