"""Which of the other libraries' ways to generate are timed, and on what machine they run.

vLLM is not among them: it brings a torch of its own, which is not the one that p828 runs with.
"""

import importlib.util

from p828.bench.systems import System
from p828.config import Config

PEERS = ("transformers", "llama.cpp")
MODULES = {"transformers": "transformers", "llama.cpp": "xllamacpp"}


def peer_systems(config: Config, peers: tuple[str, ...], device: str) -> list[System]:
    """What is timed of each."""
    systems = []
    if "transformers" in peers:
        module = {"module": "transformers_generate"}
        systems.append(System("transformers, generate", "transformers", config, module))
        if device == "cuda":
            options = {**module, "is_compiled": True}
            systems.append(System("transformers, static cache, compiled", "transformers", config, options))
    if "llama.cpp" in peers:
        systems.append(System("llama.cpp", "xllamacpp", config, {"module": "llama_cpp_generate"}))
    return systems


def missing(peer: str, device: str) -> str | None:
    """Why a peer cannot be timed here, in words that say what to do; None if it can."""
    module = MODULES[peer]
    if importlib.util.find_spec(module) is None:
        return f"it is not installed. pip install {module}"
    if peer == "llama.cpp" and device == "cuda":
        return "the wheel xllamacpp has llama.cpp for CPUs. With --device cpu it is accepted"
    return None
