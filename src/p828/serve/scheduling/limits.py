"""How much a server takes on."""

import math
from dataclasses import dataclass

from p828.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """How many requests run, how many wait, and for how long. Raises ConfigError for a value out of range."""

    max_running: int = 64
    """Requests decoded at a time; each has a slot of the key-value cache, whose memory is taken at the start."""
    max_waiting: int = 256
    """Requests that wait for a slot; one more is refused (HTTP 429), with the seconds after which to try again."""
    max_seconds: float = 600.0
    """Longest that a request may take, from its arrival to its last token."""

    def __post_init__(self) -> None:
        _check("max_running", self.max_running, self.max_running >= 1, "a whole number of at least 1")
        _check("max_waiting", self.max_waiting, self.max_waiting >= 0, "a whole number of at least 0")
        accepted = 0 < self.max_seconds < math.inf
        _check("max_seconds", self.max_seconds, accepted, "a number of seconds above 0")


def _check(name: str, value: object, accepted: bool, words: str) -> None:
    if not accepted:
        raise ConfigError(f"{name} = {value}: {words} is accepted")
