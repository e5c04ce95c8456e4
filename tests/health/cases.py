"""What the proof runs: a `Fault` is one thing broken in the real code, a `Healthy` run is one with nothing broken."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpus import SEQUENCE, files

from p828.config import Config, from_dict

Settings = dict[str, dict[str, Any]]
"""Keys of a configuration by section."""
Strength = float | str
"""How hard a fault strikes; a word where the fault has several forms."""
Injection = Callable[[Strength], AbstractContextManager[Any]]
"""Breaks one thing in p828 while a run is made in this process."""

STEPS = 240
STRIKES_AT = 150
"""Steps that are sound before a fault that begins in the middle."""


def unbroken(strength: Strength) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Fault:
    """One thing broken in a run, and the findings that name it."""

    number: int
    """Of the failure in the list of docs/health.md; from 26 on the ten beyond the list."""
    name: str
    rules: tuple[str, ...]
    """Rules that name the cause: one of them has to be among the first two findings."""
    inject: Injection = unbroken
    strengths: tuple[Strength, ...] = ("on",)
    settings: Callable[[Strength, Path], Settings] = lambda strength, corpus: {}
    """Changes to `base`, given the strength and where the corpus is."""
    strikes_at: int = 1
    """First step that is broken."""
    is_resumed: bool = False
    """Sound until it is ended by SIGTERM in the middle, and broken once it is started again."""
    hangs: bool = False
    """Judged while its process holds the run, and then killed."""
    has_own_disk: bool = False
    """On a disk of as many megabytes as the strength says, which only root can make."""
    ranks: int = 1
    """Processes that train together, over gloo."""
    words: str = ""
    """What the evidence has to name beside the rule."""


@dataclass(frozen=True)
class Healthy:
    """A run in which nothing is broken."""

    name: str
    settings: Callable[[Path], Settings] = field(default=lambda corpus: {})
    seed: int = 0
    inject: Injection = unbroken
    """What happens to a sound run all the same, as bad data that it rolls back from."""
    is_resumed: bool = False
    """Ended by SIGTERM in the middle, and started again."""
    ranks: int = 1
    """Processes that train together, over gloo."""


def base(corpus: Path) -> Settings:
    """A model of 0.2 million parameters that 240 steps take from 6.4 to about 3.8 nats, in five seconds."""
    return {
        "model": {
            "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": SEQUENCE, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "initializer_range": 0.06,
        },
        "data": {**files(corpus, "code"), "validation": {"fraction": 0.03}},
        "tokenizer": {"name": str(corpus / "tokenizer.json")},
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 30},
        "balance": {"update_rate": 0.01},
        "train": {"steps": STEPS, "micro_batch_size": 4, "gradient_accumulation": 2, "device": "cpu"},
        "evaluation": {"every": 50, "rows": 32},
        "checkpoint": {"every": 50},
    }  # fmt: skip


def joined(*settings: Settings) -> Settings:
    """Later keys in place of earlier ones, section by section. A mixture replaces the one source."""
    found: Settings = {}
    for sections in settings:
        for section, keys in sections.items():
            found[section] = {**found.get(section, {}), **keys}
    if "mixture" in found.get("data", {}):
        found["data"] = {key: value for key, value in found["data"].items() if key not in ("source", "files")}
    return found


def config_of(settings: Settings, directory: Path, name: str, seed: int) -> Config:
    settings = joined(settings, {"train": {"seed": seed}})
    return from_dict({"name": name, "runs_dir": str(directory), **settings}, name)
