"""What p828 knows of an architecture of other libraries: its configuration and the names of its tensors.

Nothing here imports torch, so that `p828 train --dry-run` can say where a model may go.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from p828.config import ModelConfig
from p828.model.costs import projected_width

STACKED = re.compile(r"(?P<mlp>.*\.mlp)\.experts\.(?P<projection>gate_up_proj|down_proj)")
Place = tuple[int | slice, ...]


class Piece(NamedTuple):
    """A tensor of theirs, and its place in one of ours."""

    name: str
    """Theirs."""
    place: Place
    """`ours[place]` is the tensor; () is all of it."""


@dataclass(frozen=True)
class Architecture:
    model_type: str
    """Hugging Face's name of it, as `glm4_moe`."""
    class_name: str
    """transformers' class with an output head, as `Glm4MoeForCausalLM`."""
    obstacles: Callable[[ModelConfig], list[str]]
    """What of a configuration it does not have, in a few words each, as "sinks"; nothing: it is exactly the model."""
    to_config: Callable[[ModelConfig], dict[str, Any]]
    """The content of config.json but for what every architecture has (`architectures`, token ids, dtype)."""
    pieces: Callable[[str, ModelConfig], list[Piece]]
    """Their tensors that are one of our state's, by its name; none for what they do not store."""


def pieces(name: str, config: ModelConfig) -> list[Piece]:
    """As most architectures have it: our names, but a tensor for each expert and projection."""
    if config.tie_word_embeddings and name == "lm_head.weight":
        return []
    stacked = STACKED.fullmatch(name)
    if stacked is None:
        return [Piece(name, ())]
    experts = f"{stacked['mlp']}.experts"
    if stacked["projection"] == "down_proj":
        return [Piece(f"{experts}.{expert}.down_proj.weight", (expert,)) for expert in range(config.n_routed_experts)]
    width = projected_width(config.hidden_act, config.moe_intermediate_size)
    halves = (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width)))
    return [
        Piece(f"{experts}.{expert}.{projection}.weight", (expert, half))
        for expert in range(config.n_routed_experts)
        for projection, half in halves
    ]


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers, where every architecture spells them alike."""
    scaling = config.rope_scaling
    plain = {"rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    if scaling.factor == 1:
        return {"rope_type": "default", **plain}
    return {
        "rope_type": "yarn",
        **plain,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }


def has_reversed_ramp(config: ModelConfig) -> bool:
    """Whether YaRN's ramp over the pairs of a head ends before it begins (`model.rope.inverse_frequencies`).

    p828 and llama.cpp make a step of it; transformers, as the authors' code does, a ramp that falls.
    """
    scaling = config.rope_scaling
    low, high = (
        config.head_dim
        * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    return scaling.factor > 1 and max(math.floor(low), 0) > min(math.ceil(high), config.head_dim - 1)
