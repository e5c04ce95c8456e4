"""Lines that begin with a status and a name, in any width of terminal."""

import shutil
import sys
import textwrap

from rich.console import Console
from rich.text import Text

from p828.cli.output import printable

STATUS, NAME = 9, 24  # columns
WIDE = 72  # columns from which names have a column of their own
NARROWEST = 24  # columns of text, whatever the terminal says
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red", "critical": "bold red", "note": "dim"}


def show_headline(text: str) -> None:
    """Print what stands above such lines, or alone."""
    width = max(shutil.get_terminal_size().columns - 1, NARROWEST)
    print(textwrap.fill(printable(text), width, break_long_words=False, break_on_hyphens=False))


def show_status(status: str, name: str, text: str, *notes: str) -> None:
    """Print the text behind its status and name, and each note that is not empty below it. At once."""
    columns = shutil.get_terminal_size().columns  # COLUMNS, if it is set; 80 where this is no terminal
    lines = status_lines(name, text, [f"→ {note}" for note in notes if note], columns)
    head = Text(f"{status:<{STATUS}}", style=STYLES.get(status, ""))
    # Wrapped here, since rich would begin a further line at the first column.
    Console(highlight=False, markup=False, soft_wrap=True).print(head + Text("\n".join(lines)))
    sys.stdout.flush()


def status_lines(name: str, text: str, notes: list[str], columns: int) -> list[str]:
    """The lines behind the status, the further ones indented so that they stand below the text."""
    is_wide = columns >= WIDE
    first = f"{name:<{NAME - 1}} " if is_wide else f"{name}: "
    indent = " " * (STATUS + NAME) if is_wide else "  "
    width = max(columns - 1, len(indent) + NARROWEST)
    shown = [
        (" " * STATUS + first + printable(text), indent),
        *((indent + printable(note), indent + "  ") for note in notes),
    ]
    lines = [
        line
        for paragraph, further in shown
        for line in textwrap.wrap(paragraph, width, subsequent_indent=further, break_on_hyphens=False)
    ]
    return [lines[0][STATUS:], *lines[1:]]
