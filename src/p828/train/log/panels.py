"""What a record is to trackers: its numbers under the names of panels, which are a group, a slash, the record's key.

The groups are `train/`, `val/`, `moe/` (router and experts), `perf/` (speed, memory, disk) and `health/` (what the
rules of run health look at). W&B, TensorBoard and trackio each make a section of what is before the slash.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from p828.engine.interface import BY_PART

GROUPS = {"step": "train", "eval": "val", "tasks": "val", "probe": "health"}
"""The group of a record's kind, for keys that have none of their own. Records of other kinds have no numbers."""
PERF = frozenset({
    "tokens_per_second", "mfu", "seconds", "data_seconds", "host_seconds", "compilations", "memory_bytes",
    "rank_memory_bytes", "disk_free_bytes",
})  # fmt: skip
HEALTH = frozenset({*BY_PART, "sink_mean", "max_token"})
MOE = frozenset({"aux_loss"})
OVER_LAYERS: dict[str, Callable[[Sequence[Any]], float]] = {
    "balance": min,
    "min_share": min,
    "max_share": max,
    "starved": sum,
    "router_entropy": min,
    "bias_max": max,
    "bias_load_correlation": min,
}
"""Of what has an entry a layer: which number tells most about all layers. It is `moe/min_share`, a layer's own
`moe/min_share/layer_0`."""
SAMPLE, FINDING = "sample", "finding"  # kinds of records that have texts
SAMPLES = "val/samples"  # the name of the continued prompts
ALERT_LEVELS = {"critical": "ERROR", "warning": "WARN", "note": "INFO"}  # of W&B and trackio, by a finding's severity
LOAD = "load"  # of each expert of each layer: a series of each would be too much for a page


def panels(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The record's numbers by `group/key`, `group/key/entry` for an object, and `group/key/layer_0` for a list.

    `kind` is one of `GROUPS`. Texts, missing numbers and the experts' loads are left out.
    """
    if kind == "tasks":
        values = values["results"]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key == LOAD:
            continue
        name = f"{_group(kind, key, value)}/{key}"
        if isinstance(value, Mapping):
            found |= {f"{name}/{entry}": number for entry, number in value.items()}
        elif isinstance(value, list):
            entry = "rank" if key == "rank_memory_bytes" else "layer"
            if key in OVER_LAYERS and (known := [number for number in value if number is not None]):
                found[name] = OVER_LAYERS[key](known)
            found |= {f"{name}/{entry}_{index}": number for index, number in enumerate(value)}
        else:
            found[name] = value
    return {name: +number for name, number in found.items() if isinstance(number, int | float)}


def expert_loads(values: Mapping[str, Any]) -> dict[str, list[int]]:
    """The tokens that each expert got, by `moe/load/layer_0` and so on: a heat map of experts over steps.

    Empty for a record without them.
    """
    return {f"moe/{LOAD}/layer_{layer}": load_E for layer, load_E in enumerate(values.get(LOAD, ()))}


def alert_text(finding: Mapping[str, Any]) -> str:
    return f"{finding['evidence']}\nCause: {finding['cause']}\nTo do: {finding['remedy']}"


def _group(kind: str, key: str, value: Any) -> str:
    if kind != "step":
        return GROUPS[kind]
    if key in PERF:
        return "perf"
    if key in HEALTH:
        return "health"
    return "moe" if key in MOE or isinstance(value, list) else GROUPS[kind]
