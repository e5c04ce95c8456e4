"""What `shim.c` is set up by."""

from collections.abc import Callable

Shim = Callable[..., None]
"""Takes the settings that stand at the head of `shim.c`, in small letters."""
