"""What is timed for a shape: p828 with and without its extras, and the peers on the same sizes."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from p828.config import Config, from_dict, load, validate, with_vocabulary
from p828.config.values import flatten, to_dict
from p828.errors import ConfigError, did_you_mean

PEERS = ("transformers", "torchtitan")
ROUTINGS = {
    "model": "routing as the fresh model's own routers choose",
    "random": "random routing: every token's experts drawn evenly",
    "balanced": "forced balance: every expert gets the same number of tokens, whatever the router says",
}


@dataclass(frozen=True)
class System:
    """One row of the table."""

    label: str
    framework: Literal["p828", "transformers", "torchtitan"]
    config: Config
    experts: str = "grouped_mm"
    """transformers' `experts_implementation`."""
    is_compiled: bool = False
    has_liger_head: bool = False
    """Liger's fused head and loss in place of transformers' own."""
    has_float32_weights: bool = False
    """float32 weights and moments under bfloat16 autocast, in place of bfloat16 throughout."""

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"config": to_dict(self.config)}


def system_from_dict(values: dict[str, Any]) -> System:
    return System(**values | {"config": from_dict(values["config"], "system")})


def load_shape(name: str, device: str, micro_batch_size: int, gradient_accumulation: int) -> Config:
    """A preset or TOML file on a device; the sizes, unless 0, in place of its own. Raises ConfigError."""
    config = load(name)
    train = dataclasses.replace(
        config.train,
        device="cuda" if device == "cuda" else "cpu",
        micro_batch_size=micro_batch_size or config.train.micro_batch_size,
        gradient_accumulation=gradient_accumulation or config.train.gradient_accumulation,
    )
    config = dataclasses.replace(config, train=train)
    validate(config)
    return with_vocabulary(config)


def common_to_all(config: Config) -> Config:
    """The nearest configuration that every peer can compute."""
    model = dataclasses.replace(
        config.model, hidden_act="swiglu", dropout=0.0, scoring_func="sigmoid", n_group=1, topk_group=1
    )
    train = dataclasses.replace(config.train, gradient_checkpointing=False)
    return dataclasses.replace(config, model=model, train=train)


def describe_changes(before: Config, after: Config) -> list[str]:
    """A text for each setting that differs."""
    old, new = flatten(before), flatten(after)
    return [f"{key} = {new[key]!r} (the shape's is {old[key]!r})" for key in old if old[key] != new[key]]


def own_systems(config: Config) -> list[System]:
    """p828 with everything that the peers lack, and without."""

    def with_extras(is_on: bool) -> Config:
        model = dataclasses.replace(config.model, attention_sinks=is_on, use_qk_norm=is_on, mask_documents=is_on)
        return dataclasses.replace(config, model=model)

    return [
        System("p828", "p828", with_extras(True)),
        System("p828, without sinks, q/k norm, document masking", "p828", with_extras(False)),
    ]


def peer_systems(config: Config, peers: tuple[str, ...], device: str) -> list[System]:
    systems = []
    if "transformers" in peers and device == "cuda":
        systems += [
            System("transformers, eager", "transformers", config),
            System("transformers, compiled", "transformers", config, is_compiled=True),
        ]
        if has_liger():
            label = "transformers, compiled, Liger's head"
            systems.append(System(label, "transformers", config, is_compiled=True, has_liger_head=True))
    elif "transformers" in peers:
        # Which of the two is the faster one depends on the experts' number and size. `batched_mm`, which copies an
        # expert's weights for every token, took twenty times as long.
        systems += [
            System(f"transformers, eager, experts {way!r}", "transformers", config, experts=way)
            for way in ("eager", "grouped_mm")
        ]
    if "torchtitan" in peers:
        systems += [
            System("torchtitan, compiled", "torchtitan", config, is_compiled=True),
            System(
                "torchtitan, compiled, float32 weights", "torchtitan", config, is_compiled=True,
                has_float32_weights=True,
            ),
        ]  # fmt: skip
    return systems


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def check_peers(peers: tuple[str, ...], device: str) -> None:
    """Raises ConfigError for a peer that is unknown, not installed, or cannot run here."""
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"--peers {peer}{did_you_mean(peer, PEERS)} Accepted: {', '.join(PEERS)}")
        if importlib.util.find_spec(peer) is None:
            raise ConfigError(f"--peers {peer}: it is not installed. pip install {peer}")
        if peer == "torchtitan" and device != "cuda":
            raise ConfigError("--peers torchtitan: its experts need a GPU. On a CPU transformers is accepted")
