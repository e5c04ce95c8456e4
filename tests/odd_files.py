"""What may lie where a regular file is expected."""

import os
import socket
from pathlib import Path


def put(kind: str, path: Path, outside: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir(parents=True)
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "link to nothing":
        path.symlink_to(outside.with_name("nothing"))
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
