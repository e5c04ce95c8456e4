"""Lines typed at a terminal, with a history of those of earlier days."""

from collections.abc import Callable, Iterator

from prompt_toolkit import PromptSession

from p828.cli.generation.line_history import LineHistory
from p828.errors import warn

LEAVING = "Ctrl-D ends"


def typed_lines(status: Callable[[], str]) -> Iterator[str]:
    """Each line that is entered, until Ctrl-D. A status, if there is one, stands below the line while it is typed.

    Ctrl-C drops what is typed, and at an empty line says how to leave.
    """
    session: PromptSession[str] = PromptSession(history=LineHistory(), enable_suspend=True)
    while True:
        try:
            line = session.prompt("> ", bottom_toolbar=status if status() else None, reserve_space_for_menu=0)
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                warn(LEAVING)
            continue
        except EOFError:
            return
        yield line
