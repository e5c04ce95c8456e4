"""What is timed for a shape: p828 with and without its extras."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from p828.config import Config, from_dict, load, validate, with_vocabulary
from p828.config.values import flatten, to_dict

ROUTINGS = {
    "model": "routing as the fresh model's own routers choose",
    "random": "random routing: every token's experts drawn evenly",
    "balanced": "forced balance: every expert gets the same number of tokens, whatever the router says",
}


@dataclass(frozen=True)
class System:
    """One row of the table."""

    label: str
    framework: str
    """p828, or the library whose model it is."""
    config: Config
    options: dict[str, Any] = field(default_factory=dict)
    """What that library is asked for besides the sizes."""

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
