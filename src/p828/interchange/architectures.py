"""Which architecture of transformers a model is exactly; our own, whose code an export carries, if it is none."""

from p828.config import ModelConfig
from p828.errors import ConfigError
from p828.interchange.architecture import Architecture, has_reversed_ramp
from p828.interchange.glm4_moe import GLM4_MOE
from p828.interchange.mimo_v2_flash import MIMO_V2_FLASH
from p828.interchange.own import OWN

NATIVE = (GLM4_MOE, MIMO_V2_FLASH)
REVERSED_RAMP = (
    "model.rope_scaling: over the original context no pair of a head's dimensions turns between beta_slow and "
    "beta_fast times, and transformers scales the frequencies otherwise then"
)


def native_architecture(config: ModelConfig) -> Architecture | None:
    """The first that is exactly the model; None if there is none."""
    return next((architecture for architecture in NATIVE if not architecture.obstacles(config)), None)


def architecture_of(config: ModelConfig, native_only: bool = False) -> Architecture:
    """What a model is exported as.

    Raises ConfigError with `native_only` where that is our own, and for what transformers computes otherwise at all.
    """
    if has_reversed_ramp(config):
        raise ConfigError(REVERSED_RAMP)
    found = native_architecture(config)
    if found is None and native_only:
        raise ConfigError(
            f"no architecture of transformers is exactly this model. In the way are, of {all_obstacles(config)}; "
            "without --native-only it is exported with code of its own"
        )
    return found or OWN


def obstacles(config: ModelConfig) -> list[str]:
    """What the nearest architecture does not have, in a few words each."""
    return min((architecture.obstacles(config) for architecture in NATIVE), key=len)


def export_line(config: ModelConfig) -> str:
    """What `p828 export` will make of a model, in a line."""
    if has_reversed_ramp(config):
        return f"does not export: {REVERSED_RAMP}"
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
