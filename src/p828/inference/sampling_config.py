"""How a text is continued: the settings of sampling, and where it ends."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

from p828.config.values import LONGEST_SHOWN, shown
from p828.errors import ConfigError, did_you_mean

GREEDY_BELOW = 1e-5  # logits divided by less could overflow float32
MOST_TOKENS = 2**31  # of any vocabulary
SEEDS = -(2**63), 2**63 - 1
MOST_FLOAT = sys.float_info.max
PENALTIES = 0.001, 1000.0  # with others logits could overflow, too; those in use are near 1


class Drawing(NamedTuple):
    """Which parts of sampling a step's rows need; the others are left out, which changes no token."""

    draws: bool
    """Some row draws, or has a penalty: otherwise all take their likeliest token."""
    has_filters: bool
    has_penalty: bool


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

    @cached_property
    def drawing(self) -> Drawing:
        """Of a row by itself. Filters change no likeliest token, and so matter to rows that draw alone."""
        has_penalty = self.repetition_penalty != 1
        has_filters = not self.greedy and bool(self.top_k or self.top_p < 1 or self.min_p)
        return Drawing(has_penalty or not self.greedy, has_filters or has_penalty, has_penalty)


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
