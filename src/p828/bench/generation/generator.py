"""What a system offers to be measured."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Timed(NamedTuple):
    """Some steps of a batch whose prompts were read before."""

    seconds: float
    """Of one step, in the mean."""
    cached_tokens: float
    """Of one sequence, in the mean over the steps."""


class Generator(Protocol):
    dtype: str
    """Of most weights."""

    def steps(self, prompts: Sequence[Sequence[int]], steps: int, is_sampled: bool) -> Timed:
        """Continue all prompts together."""

    def first_token(self, prompt: Sequence[int]) -> float:
        """Seconds from a prompt to the first token after it."""
