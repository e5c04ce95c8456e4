"""JSON strictly by RFC 8259, from files in which nothing is to be passed over."""

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
            raise ValueError(f"{json.dumps(key)[:80]} is given twice")
        found[key] = value
    return found


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits: at most {MOST_DIGITS:,} are accepted")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:80]} is not a finite number")
    return float(text)
