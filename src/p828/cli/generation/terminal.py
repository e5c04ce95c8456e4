"""Lines typed at a terminal, with a history of those of earlier days."""

from collections.abc import Callable, Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys

from p828.cli.generation.line_history import LineHistory
from p828.errors import warn

LEAVING = "Ctrl-D ends"


def typed_lines(status: Callable[[], str]) -> Iterator[str]:
    """Each line that is entered, until Ctrl-D. A status, if there is one, stands below the line while it is typed.

    Ctrl-C drops what is typed, and at an empty line says how to leave.
    """
    session: PromptSession[str] = PromptSession(history=LineHistory(), enable_suspend=True, key_bindings=_keys())
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


def _keys() -> KeyBindings:
    """Those that prompt_toolkit lacks: it takes a colour for a move of a mouse, and fails to find where."""
    keys = KeyBindings()
    keys.add(Keys.Vt100MouseEvent)(lambda event: None)
    return keys
