"""Which architecture of llama.cpp a model is exactly, if it is one. No torch.

llama.cpp's `src/models/*.cpp` say what an architecture has.
"""

from collections.abc import Callable
from typing import NamedTuple

from p828.config import ModelConfig
from p828.errors import ConfigError

MOST_LAYERS, MOST_EXPERTS = 512, 1024  # what llama.cpp's arrays have room for
SINKS, SHARED_EXPERT, NO_SHARED_EXPERT = "sinks", "shared expert", "no shared expert"
WITHOUT = {
    SINKS: "--model.attention-sinks False",
    SHARED_EXPERT: "--model.n-shared-experts 0",
    NO_SHARED_EXPERT: "--model.n-shared-experts 1",
}
"""What a model is trained with to be without an obstacle."""


class LlamaCppArchitecture(NamedTuple):
    name: str
    """llama.cpp's, a value of `gguf.MODEL_ARCH_NAMES`."""
    obstacles: Callable[[ModelConfig], list[str]]
    """What of a configuration it does not have, in a few words each; nothing: it is exactly the model."""


def architecture_of(config: ModelConfig) -> LlamaCppArchitecture:
    """The architecture of llama.cpp that is exactly the model. Raises ConfigError naming what each one lacks."""
    for architecture in ARCHITECTURES:
        if not architecture.obstacles(config):
            return architecture
    ways = _ways_out(config)
    advice = f". A model that is trained with {' or '.join(ways)} is in one" if ways else ""
    raise ConfigError(f"llama.cpp has no architecture that is exactly this model\nNot in {_lacking(config)}{advice}")


def gguf_line(config: ModelConfig) -> str:
    """Whether `p828 export` will write a model for llama.cpp, in a line."""
    for architecture in ARCHITECTURES:
        if not architecture.obstacles(config):
            return f"exports to .gguf as {architecture.name}"
    return f"exports to no .gguf: not in {_lacking(config)}"


def _lacking(config: ModelConfig) -> str:
    """What each architecture does not have."""
    return "; not in ".join(f"{known.name}: {', '.join(known.obstacles(config))}" for known in ARCHITECTURES)


def _ways_out(config: ModelConfig) -> list[str]:
    """The flags with which a model like this one is in an architecture, for each that only such flags keep it from."""
    found = [known.obstacles(config) for known in ARCHITECTURES]
    return [" ".join(WITHOUT[words] for words in lacking) for lacking in found if set(lacking) <= set(WITHOUT)]


def _glm4moe_obstacles(config: ModelConfig) -> list[str]:
    found = {SINKS: config.attention_sinks, NO_SHARED_EXPERT: config.n_shared_experts == 0}
    return [words for words, is_there in found.items() if is_there] + _common_obstacles(config)


def _mimo2_obstacles(config: ModelConfig) -> list[str]:
    found = {
        SHARED_EXPERT: config.n_shared_experts > 0,
        "norms on q and k": config.use_qk_norm,
        "softmax router": config.scoring_func != "sigmoid",
        "norm_topk_prob = false": not config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor != 1,
        "YaRN": config.rope_scaling.factor != 1,  # its sliding layers, of which there must be one, leave it out
    }
    return [words for words, is_there in found.items() if is_there] + _common_obstacles(config)


def _common_obstacles(config: ModelConfig) -> list[str]:
    scaling = config.rope_scaling
    found = {
        config.hidden_act: config.hidden_act != "swiglu",
        "YaRN's beta_fast but 32": scaling.factor != 1 and scaling.beta_fast != 32,
        "YaRN's beta_slow but 1": scaling.factor != 1 and scaling.beta_slow != 1,
        f"more than {MOST_LAYERS} layers": config.num_hidden_layers > MOST_LAYERS,
        f"more than {MOST_EXPERTS} experts": config.n_routed_experts > MOST_EXPERTS,
    }
    return [words for words, is_there in found.items() if is_there]


ARCHITECTURES = (
    LlamaCppArchitecture("glm4moe", _glm4moe_obstacles),
    LlamaCppArchitecture("mimo2", _mimo2_obstacles),
)
