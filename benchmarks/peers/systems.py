"""Which of the other libraries' settings are timed, and on what machine they run."""

import importlib.util

from p828.bench.systems import System
from p828.config import Config

PEERS = ("transformers", "torchtitan")


def peer_systems(config: Config, peers: tuple[str, ...], device: str) -> list[System]:
    """A row of the table each."""
    systems = []
    if "transformers" in peers and device == "cuda":
        systems += [
            System("transformers, eager", "transformers", config),
            System("transformers, compiled", "transformers", config, {"is_compiled": True}),
        ]
        if has_liger():
            options = {"is_compiled": True, "has_liger_head": True}
            systems.append(System("transformers, compiled, Liger's head", "transformers", config, options))
    elif "transformers" in peers:
        # Which of the two is the faster one depends on the experts' number and size. `batched_mm`, which copies an
        # expert's weights for every token, took twenty times as long.
        systems += [
            System(f"transformers, eager, experts {way!r}", "transformers", config, {"experts": way})
            for way in ("eager", "grouped_mm")
        ]
    if "torchtitan" in peers:
        label, weights = "torchtitan, chunked loss, CUDA graph", {"has_float32_weights": True}
        systems += [
            System(label, "torchtitan", config),
            System(f"{label}, float32 weights", "torchtitan", config, weights),
        ]
    return systems


def left_out(peers: tuple[str, ...], device: str) -> list[str]:
    """A line for each row that would be there if something else were installed."""
    if "transformers" in peers and device == "cuda" and not has_liger():
        return ["transformers with Liger's head is left out: liger-kernel is not installed"]
    return []


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def missing(peer: str, device: str) -> str | None:
    """Why a peer cannot be timed here, in words that say what to do; None if it can."""
    if importlib.util.find_spec(peer) is None:
        return f"it is not installed. pip install {peer}, or p828's extra `peers`"
    if peer == "torchtitan" and device != "cuda":
        return "its CUDA graph needs a GPU. On a CPU transformers is accepted"
    return None
