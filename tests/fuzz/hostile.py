"""Files that were meant to be something else: mutations of bytes, and of the values in JSON and TOML."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

HOSTILE = st.one_of(
    st.sampled_from([
        None, True, -1, 0, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**70), 1e308, "", "..", "../../../etc/passwd", "/",
        "\0", "a" * 5000, "\ud800",
    ]),
    st.builds(list), st.builds(dict), st.builds(lambda: [[]]), st.builds(lambda: {"": {}}),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.integers(1, 100_000).map(lambda depth: Nested(depth)),
)  # fmt: skip
NAMES = st.sampled_from(["", "..", "../../x.safetensors", "x" * 300]) | st.text(max_size=8)


class Nested:
    """Stands for a list in a list in a list, deeper than can be built or printed value by value."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __repr__(self) -> str:
        return f"Nested({self.depth})"


def to_json(value: Any) -> bytes:
    nested: list[Nested] = []

    def mark(found: Any) -> str:
        nested.append(found)
        return f"@{len(nested) - 1}@"

    text = json.dumps(value, default=mark)
    for number, one in enumerate(nested):
        text = text.replace(f'"@{number}@"', "[" * one.depth + "]" * one.depth)
    return text.encode("utf-8", "surrogatepass")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything inside."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [found for key, item in items for found in places(item, (*path, key))]
        return [*([path] if path else []), *inner]
    return [path]


@st.composite
def mutated_values(draw: st.DrawFn, valid: Any) -> Any:
    """A copy with one to three places replaced, removed or renamed."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            break
        *way, last = draw(st.sampled_from(found))
        holder = value
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if action == "replace":
            holder[last] = draw(HOSTILE)
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(NAMES)] = holder.pop(last)
        else:
            del holder[last]
    return value


@st.composite
def mutated_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A copy with bytes flipped, cut off, taken out or put in."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        action = draw(st.sampled_from(["flip", "flip", "cut", "take", "put"]))
        if action == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del content[at:]
        elif action == "take":
            del content[at : at + draw(st.integers(1, 64))]
        else:
            content[at:at] = draw(st.binary(max_size=64) | st.sampled_from([b"[" * 50_000, b"9" * 50_000, b"\xff\xfe"]))
    return bytes(content)
