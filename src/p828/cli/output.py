"""Text that a model wrote, shown without letting it steer the terminal."""

import io
import sys
import unicodedata


def printable(text: str) -> str:
    """`text` with control characters (Unicode's category Cc) other than newline and tab as \\xNN."""
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def show(text: str, end: str = "") -> None:
    """Print at once, with what the output's encoding lacks as \\u escapes. Raises BrokenPipeError at a closed pipe."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(printable(text), end=end, flush=True)
