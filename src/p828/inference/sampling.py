"""From logits to the next token."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from p828.config.values import LONGEST_SHOWN, shown
from p828.errors import ConfigError, did_you_mean
from p828.model.random_normal import GOLDEN_GAMMA, Key, fill_uniform_

GREEDY_BELOW = 1e-5  # logits divided by less could overflow float32
MOST_TOKENS = 2**31  # of any vocabulary
SEEDS = -(2**63), 2**63 - 1
MOST_FLOAT = sys.float_info.max
PENALTIES = 0.001, 1000.0  # with others logits could overflow, too; those in use are near 1


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Raises ConfigError for a value of another type, or out of range."""

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
    slide: bool = False
    """Where the context is full, go on with its first tokens and its newer half; without it the text ends there."""

    def __post_init__(self) -> None:
        words = "a finite number of at least 0"
        _check("temperature", self.temperature, _is_number(self.temperature, 0, MOST_FLOAT), words)
        _check("top_k", self.top_k, _is_whole(self.top_k, 0), "a whole number of at least 0 (0 is off)")
        is_fraction = _is_number(self.top_p, 0, 1) and self.top_p > 0
        _check("top_p", self.top_p, is_fraction, "a fraction above 0 and up to 1")
        _check("min_p", self.min_p, _is_number(self.min_p, 0, 1), "a fraction from 0 to 1")
        penalty, words = self.repetition_penalty, f"a number from {PENALTIES[0]} to {PENALTIES[1]} (1 is off)"
        _check("repetition_penalty", penalty, _is_number(penalty, *PENALTIES), words)
        _check("max_new_tokens", self.max_new_tokens, _is_whole(self.max_new_tokens, 1), "a whole number of at least 1")
        _check("stop", self.stop, isinstance(self.stop, tuple), "text that is not empty")
        for text in self.stop:
            _check("stop", text, isinstance(text, str) and text != "", "text that is not empty")
        _check("seed", self.seed, _is_whole(self.seed, *SEEDS), f"a whole number from {SEEDS[0]} to {SEEDS[1]}")
        _check("slide", self.slide, isinstance(self.slide, bool), "true or false")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def sampling_config(values: Mapping[str, Any]) -> SamplingConfig:
    """From values by the names of its fields; `stop` may be one text. Raises ConfigError, also for an unknown name."""
    names = [field.name for field in fields(SamplingConfig)]
    for name in values:
        if name not in names:
            given = name[:LONGEST_SHOWN]
            raise ConfigError(f"unknown setting {given}{did_you_mean(given, names)} Accepted: {', '.join(names)}")
    stop = values.get("stop", ())
    texts = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    return SamplingConfig(**{**values, "stop": texts})


def _is_number(value: object, least: float, most: float) -> bool:
    return (type(value) is int or isinstance(value, float)) and least <= value <= most


def _is_whole(value: object, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def _check(name: str, value: object, accepted: bool, words: str) -> None:
    if not accepted:
        raise ConfigError(f"{name} = {shown(value)}: {words} is accepted")


class RowSettings(NamedTuple):
    """How each row's token is drawn: the settings of `SamplingConfig`, float32 (B, 1) and for `top_k` int64."""

    temperature: Tensor
    """0 for a row that takes its likeliest token."""
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor


def row_settings(configs: Sequence[SamplingConfig], device: torch.device) -> RowSettings:
    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    return RowSettings(
        column([0.0 if config.greedy else config.temperature for config in configs]),
        column([min(config.top_k, MOST_TOKENS) for config in configs], torch.int64),
        column([config.top_p for config in configs]),
        column([config.min_p for config in configs]),
        column([config.repetition_penalty for config in configs]),
    )


def uniform_numbers(seed: int, count: int, start: int = 0) -> Tensor:
    """float32 (count,), from 0 to below 1: what the token at each position of a sequence, from `start` on, is drawn by.

    They depend on seed and position alone, so that a sequence draws the same whatever is continued beside it.
    """
    numbers = torch.empty(count)
    fill_uniform_(numbers, Key(seed, GOLDEN_GAMMA), start)
    return numbers


def choose_tokens(
    logits_BV: Tensor, settings: RowSettings, uniform_B: Tensor, seen_BV: Tensor | None, has_filters: bool
) -> Tensor:
    """One token for every row, int64 (B,); −1 for a row with a logit that is no finite number.

    `logits_BV` is float32. `seen_BV` (bool) marks the tokens under the repetition penalty, None none. `has_filters`
    says whether any row has a filter or a penalty; without one the others are left out, which changes no token. No
    row's token depends on the other rows, and the host does not wait for the device.
    """
    is_finite_B = are_finite(logits_BV)
    if has_filters:
        logits_BV = penalised(logits_BV, settings, seen_BV)
    likeliest_B = logits_BV.argmax(dim=-1)
    temperature_B1 = settings.temperature
    scaled_BV = logits_BV / temperature_B1.where(temperature_B1 > 0, 1.0)
    if has_filters:
        scaled_BV = keep_min_p(keep_top(scaled_BV, settings.top_k, settings.top_p), settings.min_p)
    drawn_B = draw(scaled_BV.softmax(dim=-1), uniform_B).where(temperature_B1[:, 0] > 0, likeliest_B)
    return drawn_B.where(is_finite_B, -1)


def likeliest_tokens(logits_BV: Tensor) -> Tensor:
    """As `choose_tokens` for rows that all take their likeliest token and have no penalty."""
    if logits_BV.device.type == "cpu":  # where NumPy takes a tenth of PyTorch's time
        values = logits_BV.contiguous().numpy()
        token_B = values.argmax(axis=-1)  # of NaN if there is one
        is_finite_B = np.isfinite(values[np.arange(len(values)), token_B]) & np.isfinite(values.min(axis=-1))
        return torch.from_numpy(np.where(is_finite_B, token_B, -1))
    return logits_BV.argmax(dim=-1).where(are_finite(logits_BV), -1)


def are_finite(logits_BV: Tensor) -> Tensor:
    """bool (B,): `isfinite().all(dim=-1)` in fewer passes, since 0 times what is not finite is NaN."""
    return (logits_BV * 0).sum(dim=-1) == 0


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the probabilities, summed in the order of the tokens, first exceed the uniform number."""
    below_BV = probabilities_BV.cumsum(dim=-1)
    token_B = (below_BV <= (uniform_B * below_BV[:, -1])[:, None]).sum(dim=-1)
    # Rounded up, a number just below 1 may reach the sum of all.
    return token_B.where(token_B < probabilities_BV.shape[1], probabilities_BV.argmax(dim=-1))


def filter_logits(logits_BV: Tensor, settings: RowSettings, seen_BV: Tensor | None) -> Tensor:
    """The logits with penalty and temperature, −inf where excluded; in the order of Hugging Face's `generate`.

    Of rows that are drawn: their temperature is above 0.
    """
    scaled_BV = penalised(logits_BV, settings, seen_BV) / settings.temperature
    return keep_min_p(keep_top(scaled_BV, settings.top_k, settings.top_p), settings.min_p)


def penalised(logits_BV: Tensor, settings: RowSettings, seen_BV: Tensor | None) -> Tensor:
    """Less likely whatever the sign (CTRL, arXiv 1909.05858, section 4.1, with negative logits multiplied)."""
    if seen_BV is None:
        return logits_BV
    penalty_B1 = settings.repetition_penalty
    changed_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(seen_BV, changed_BV, logits_BV)


def keep_top(logits_BV: Tensor, k_B1: Tensor, p_B1: Tensor) -> Tensor:
    """Of each row the k largest stay, and what equals the smallest of them; all where k is 0.

    Of these, the smallest set of likeliest tokens with a probability of at least p stays (arXiv 1904.09751, section
    3.1). One sort serves both: it takes longer than all the rest.
    """
    vocabulary = logits_BV.shape[-1]
    ascending_BV, order_BV = logits_BV.sort(dim=-1)
    first_B1 = vocabulary - torch.where(k_B1 > 0, k_B1, vocabulary).clamp(max=vocabulary)
    is_below_BV = ascending_BV < ascending_BV.gather(-1, first_B1)
    excluded_BV = ascending_BV.masked_fill(is_below_BV, -math.inf).softmax(dim=-1).cumsum(dim=-1) <= 1 - p_B1
    excluded_BV &= p_B1 < 1
    excluded_BV[:, -1] = False  # rounding must not exclude the likeliest token
    excluded_BV |= is_below_BV
    return logits_BV.masked_fill(torch.zeros_like(excluded_BV).scatter(1, order_BV, excluded_BV), -math.inf)


def keep_min_p(logits_BV: Tensor, fraction_B1: Tensor) -> Tensor:
    """Tokens at least `fraction` times as likely as the likeliest stay (arXiv 2407.01082)."""
    probabilities_BV = logits_BV.softmax(dim=-1)
    least_B1 = fraction_B1 * probabilities_BV.amax(dim=-1, keepdim=True)
    return logits_BV.masked_fill(probabilities_BV < least_B1, -math.inf)
