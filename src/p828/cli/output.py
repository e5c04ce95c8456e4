"""What the commands print, in any encoding; text that a model wrote, without letting it steer the terminal."""

import io
import sys
import unicodedata


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
