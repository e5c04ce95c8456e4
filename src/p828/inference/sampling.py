"""From logits to the next token."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from p828.inference.sampling_config import MOST_TOKENS, SamplingConfig
from p828.model.random_normal import GOLDEN_GAMMA, Key, fill_uniform_


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
