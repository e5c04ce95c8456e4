"""What the commands print, in any encoding; text that a model wrote, without letting it steer the terminal."""

import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from p828.errors import warn


def open_closed_streams() -> None:
    """Point standard streams that were closed (`>&-`) at nothing: the next file would get their number, and with it
    what this process and those that it starts print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def escape_what_output_lacks() -> None:
    """Have what the encoding of standard output or error lacks, an é in ASCII, printed as a \\x or \\u escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """`text` with control characters (Unicode's category Cc) other than newline and tab as \\xNN."""
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def show(text: str, end: str = "") -> None:
    """Print at once. Raises BrokenPipeError at a closed pipe."""
    print(printable(text), end=end, flush=True)


@contextmanager
def loading_pytorch() -> Iterator[None]:
    """Say so at a terminal where the imports of the block take long; standard output is for what a command finds."""
    from p828.train.log.console import waiting

    with waiting("loading PyTorch", lambda text: warn(text) if sys.stderr.isatty() else None):
        yield
