"""One prompt and what a decoder has made of it so far, on the host."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from p828.inference.sampling_config import SamplingConfig

FinishReason = Literal["end", "stop", "length", "context", "diverged"]
"""`diverged`: the logits after the last token are no finite numbers, since the model's weights diverged."""


class Wants(NamedTuple):
    """What is to be told of each token beside the token."""

    probability: bool = False
    """The token's log-probability."""
    likeliest: int = 0
    """How many of the likeliest tokens, with theirs; at most `MOST_LIKELIEST`."""
    prompt: bool = False
    """The same of the prompt's tokens."""
    experts: bool = False
    """Which experts the step that made the token went through."""


KEPT = 4
"""First tokens that stay when a context slides: models attend to them for want of others (arXiv 2309.17453)."""
NOTHING_MORE = Wants()
MOST_LIKELIEST = 20


class TokenProbability(NamedTuple):
    """A token's log-probability among all of the vocabulary, before temperature and filters."""

    value: float
    likeliest: tuple[tuple[int, float], ...] = ()
    """Tokens and their log-probabilities, the likeliest first."""


class NewToken(NamedTuple):
    """One more token of a sequence, in the order in which they were made."""

    sequence: "DecodedSequence"
    token: int
    finish_reason: FinishReason | None
    """Why this is the last one, if it is. With `end` the token is the one that ends, and no part of the text; with
    `diverged` it is -1.
    """
    probability: TokenProbability | None
    experts_LK: tuple[tuple[int, ...], ...] | None
    """The routed experts of each layer in the step that chose this token, the best first; none for a first token."""


@dataclass(eq=False)
class DecodedSequence:
    """A prompt in a slot of a decoder, and its continuation."""

    ids: list[int]
    """The prompt, and the tokens made so far without the one that ends."""
    prompt_length: int
    config: SamplingConfig
    seed: int
    """Decides, with a token's position, the number that it is drawn by."""
    end_ids: frozenset[int]
    wants: Wants
    slot: int
    longest: int
    """Most tokens of a context."""
    read_length: int = field(init=False)
    """How many tokens of its context are read together, before single steps continue them: at first the prompt's."""
    dropped: int = 0
    """Tokens behind the first `KEPT` that the context has no more, since it slid."""
    last_length: int = field(init=False)
    """Tokens of its context after which no step continues it: it ends there, or slides."""
    on_its_way: int = 0
    """Tokens of steps that were started and have not arrived."""
    finish_reason: FinishReason | None = None
    prompt_probabilities: list[TokenProbability | None] = field(default_factory=list)
    """Of the prompt's tokens, if wanted, complete when the first token comes; None for the first of them."""

    def __post_init__(self) -> None:
        self._set_lengths()

    @property
    def context(self) -> list[int]:
        """The tokens that the next one follows, by their positions."""
        return self.ids[:KEPT] + self.ids[KEPT + self.dropped :] if self.dropped else self.ids

    @property
    def context_length(self) -> int:
        return len(self.ids) - self.dropped

    def slide(self) -> None:
        """Keep the first tokens and the newest, half of those that there is room for, to be read again."""
        self.dropped += self.context_length - min(KEPT + self.longest // 2, self.longest - 1)
        self._set_lengths()

    def _set_lengths(self) -> None:
        self.read_length = self.context_length
        self.last_length = min(self.prompt_length + self.config.max_new_tokens - self.dropped, self.longest)

    @property
    def continuation(self) -> list[int]:
        return self.ids[self.prompt_length :]


def sequence_of(
    prompt: Sequence[int],
    eos_id: int,
    config: SamplingConfig,
    seed: int,
    end_ids: Collection[int],
    wants: Wants,
    slot: int,
    longest: int,
) -> DecodedSequence:
    """An empty prompt is a document's beginning, which follows another document's end."""
    ids = list(prompt) or [eos_id]
    return DecodedSequence(ids, len(ids), config, seed, frozenset((eos_id, *end_ids)), wants, slot, longest)
