"""JSON strictly by RFC 8259, from files and requests in which nothing is to be passed over."""

import itertools
import json
import math
from typing import Any

MOST_DIGITS = 4300  # of a whole number: Python reads no longer one


def strict_json(text: str) -> Any:
    """A text's value. Raises ValueError, also for a key that is given twice and a number that is not finite.

    Raises RecursionError for what is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_finite)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is given twice, as {shown(found[key])} and as {shown(value)}")
        found[key] = value
    return found


def shown(value: Any) -> str:
    """The beginning of a value as JSON. The rest may be nested more deeply than Python's encoder can go."""
    text = "".join(itertools.islice(json.JSONEncoder().iterencode(value), 61))
    return text if len(text) <= 60 else text[:59] + "…"


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits: at most {MOST_DIGITS:,} are accepted")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:80]} is not a finite number")
    return float(text)
