"""From logits to the next token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p828.errors import ConfigError

GREEDY_BELOW = 1e-5  # logits divided by less could overflow float32
PENALTIES = 0.001, 1000.0  # with others logits could overflow, too; those in use are near 1


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Raises ConfigError for a value out of range."""

    temperature: float = 0.8
    """Divides the logits: below 1 is surer, above 1 wilder, 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw from this many likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this fraction of the probability; 1 is off."""
    min_p: float = 0.0
    """Leave out tokens with less than this fraction of the likeliest token's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the text so far less likely; 1 is off."""
    max_new_tokens: int = 128
    """Longest continuation in tokens."""
    stop: tuple[str, ...] = ()
    """Text that ends the continuation, and is cut off; repeat for more than one."""
    seed: int = 0
    """The same seed and prompt give the same text."""

    def __post_init__(self) -> None:
        infinity = math.inf
        _check("temperature", self.temperature, 0 <= self.temperature < infinity, "a number of at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "a whole number of at least 0 (0 is off)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a fraction above 0 and up to 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "a fraction from 0 to 1")
        least, most = PENALTIES
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, least <= penalty <= most, f"a number from {least} to {most} (1 is off)")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "a whole number of at least 1")
        _check("stop", list(self.stop), "" not in self.stop, "text that is not empty")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def _check(name: str, value: object, accepted: bool, words: str) -> None:
    if not accepted:
        raise ConfigError(f"{name} = {value}: {words} is accepted")


def sample(
    logits_BV: Tensor, config: SamplingConfig, seen_BV: Tensor | None, generators: Sequence[torch.Generator]
) -> Tensor:
    """One token for every row: int64 (B,).

    `logits_BV` is float32. `seen_BV` (bool) marks the tokens under the repetition penalty, None none. Each row has its
    own generator, on the logits' device, so that what a row draws does not depend on the others.
    """
    logits_BV = filter_logits(logits_BV, config, seen_BV)
    if config.greedy:
        return logits_BV.argmax(dim=-1)
    rows = zip(logits_BV.softmax(dim=-1), generators, strict=True)
    return torch.cat(
        [torch.multinomial(probabilities_V, 1, generator=generator) for probabilities_V, generator in rows]
    )


def filter_logits(logits_BV: Tensor, config: SamplingConfig, seen_BV: Tensor | None) -> Tensor:
    """The logits with penalty and temperature, −inf where excluded; in the order of Hugging Face's `generate`.

    Greedy decoding applies the penalty alone: nothing else moves the maximum.
    """
    if seen_BV is not None:
        logits_BV = torch.where(seen_BV, penalise(logits_BV, config.repetition_penalty), logits_BV)
    if config.greedy:
        return logits_BV
    logits_BV = logits_BV / config.temperature
    if config.top_k:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p < 1:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    if config.min_p:
        logits_BV = keep_min_p(logits_BV, config.min_p)
    return logits_BV


def penalise(logits_BV: Tensor, penalty: float) -> Tensor:
    """Less likely whatever the sign (CTRL, arXiv 1909.05858, section 4.1, with negative logits multiplied)."""
    return torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The k largest stay, and what equals the smallest of them."""
    threshold_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < threshold_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The smallest set of likeliest tokens with a probability of at least p stays (arXiv 1904.09751, section 3.1)."""
    ascending_BV, order_BV = logits_BV.sort(dim=-1)
    excluded_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    excluded_BV[:, -1] = False  # rounding must not exclude the likeliest token
    return logits_BV.masked_fill(excluded_BV.scatter(1, order_BV, excluded_BV), -math.inf)


def keep_min_p(logits_BV: Tensor, fraction: float) -> Tensor:
    """Tokens at least `fraction` times as likely as the likeliest stay (arXiv 2407.01082)."""
    probabilities_BV = logits_BV.softmax(dim=-1)
    return logits_BV.masked_fill(probabilities_BV < fraction * probabilities_BV.amax(dim=-1, keepdim=True), -math.inf)
