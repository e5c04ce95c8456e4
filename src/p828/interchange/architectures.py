"""Which architecture of transformers a model is, if it is one to the last bit of its mathematics."""

from p828.config import ModelConfig
from p828.interchange.architecture import Architecture
from p828.interchange.glm4_moe import GLM4_MOE
from p828.interchange.mimo_v2_flash import MIMO_V2_FLASH

NATIVE = (GLM4_MOE, MIMO_V2_FLASH)


def native_architecture(config: ModelConfig) -> Architecture | None:
    """The first that is exactly the model; None if there is none."""
    return next((architecture for architecture in NATIVE if not architecture.obstacles(config)), None)


def obstacles(config: ModelConfig) -> list[str]:
    """What the nearest architecture does not have, in a few words each."""
    return min((architecture.obstacles(config) for architecture in NATIVE), key=len)


def export_line(config: ModelConfig) -> str:
    """What `p828 export` will make of a model, in a line."""
    found = native_architecture(config)
    return (
        f"exports with remote code: {', '.join(obstacles(config))}"
        if found is None
        else f"exports as {found.model_type}"
    )


def all_obstacles(config: ModelConfig) -> str:
    """What stands in the way of each architecture, in a line."""
    return "; ".join(
        f"{architecture.model_type}: {', '.join(architecture.obstacles(config))}" for architecture in NATIVE
    )
