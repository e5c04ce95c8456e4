"""What every system is asked to do: prompts, how far they are continued, and in what order it is measured."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from p828.config import Config

RUNS = 3
"""Times that each thing is measured, after one that does not count; their median does."""
WARM_STEPS = 4
"""Steps of a whole batch before the clock runs: one of them may be captured."""
SPARE_TOKENS = 16
"""Of a sequence beyond those that are timed: p828's decoder may tell of several at once, and have started more."""
FIRST_TOKEN_PROMPTS = (512, 2048)
RECOMPUTED = 1024
"""Tokens of context at which a step with the cache stands beside reading everything again."""


@dataclass(frozen=True)
class Item:
    """One thing to measure; of the three numbers, one is given."""

    batch: int = 0
    """Steps of this many sequences."""
    first_token: int = 0
    """The first token after a prompt of this length."""
    recompute: int = 0
    """One more token at this context, without the cache and with it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.batch:
            return f"batch {self.batch}"
        return f"first token after {self.first_token:,}" if self.first_token else f"context {self.recompute:,}"


@dataclass(frozen=True)
class Workload:
    batches: tuple[int, ...]
    prompt_length: int
    new_tokens: int
    """Steps timed, of every sequence one token each."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def items(self, recomputes: bool) -> list[Item]:
        """In the order of the table. Only p828 reads everything again."""
        found = [Item(batch=batch) for batch in self.batches]
        found += [Item(first_token=length) for length in FIRST_TOKEN_PROMPTS]
        return found + ([Item(recompute=RECOMPUTED)] if recomputes else [])

    def longest(self) -> int:
        """Tokens of context that all of it takes."""
        slots = [slot_length(self.prompt_length, batch, self.new_tokens) for batch in self.batches]
        return max(*slots, *FIRST_TOKEN_PROMPTS, RECOMPUTED + self.new_tokens) + 64

    def with_context(self, config: Config) -> Config:
        """The shape with a context that is long enough."""
        context = max(config.model.max_position_embeddings, self.longest())
        return replace(config, model=replace(config.model, max_position_embeddings=context))


def slot_length(prompt_length: int, batch: int, steps: int) -> int:
    """Tokens of a sequence at most: the first one goes on while the other prompts of its batch are read."""
    pieces = batch * -(-prompt_length // 2048)
    return prompt_length + pieces + WARM_STEPS + steps + SPARE_TOKENS


def workload_from_dict(values: dict[str, Any]) -> Workload:
    return Workload(**values | {"batches": tuple(values["batches"])})


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng((seed, count, length))
    found: list[list[int]] = draw.integers(vocab_size, size=(count, length)).tolist()
    return found
