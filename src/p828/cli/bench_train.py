"""`p828 bench train`: how fast this machine trains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from p828.bench.peers import check_peers, find_peers
from p828.bench.systems import ROUTINGS, load_shape
from p828.bench.train import Bench
from p828.cli.flags import parse_given, shown_word
from p828.config.facts import LARGEST_INT
from p828.config.files import preset_names
from p828.config.rules import check_path
from p828.config.values import shown
from p828.errors import ConfigError, did_you_mean

USAGE = "p828 bench train --shape NAME [NAME ...] [--peers NAME ...] [--routing NAME ...] [--breakdown] [--json FILE]"
DESCRIPTION = (
    f"{USAGE}\n\nTimes a training step on made-up text, every system in a fresh process, one after another: p828 with "
    "and without attention sinks, q/k norm and document masking, and other libraries' models of the same sizes. MFU "
    "counts matrix products, and causal attention within the text's documents, for every system, and is a share of a "
    "large matrix product measured in the same run. First steps compile with an empty cache, unless "
    "TORCHINDUCTOR_CACHE_DIR names one."
)


@dataclass(frozen=True)
class Arguments:
    shape: tuple[str, ...] = ()
    """Presets or .toml files: sizes, micro-batch, sequence length and accumulation."""
    peers: tuple[str, ...] = ()
    """transformers, torchtitan, in the repository. All systems then compute what every one of them can."""
    routing: tuple[str, ...] = ("model",)
    """`model`: as fresh routers route; `random`; `balanced`: forced balance. A table each."""
    breakdown: bool = False
    """Also profile one step of p828: time of each part and the longest kernels."""
    steps: int = 20
    """Steps timed, after the first and some to warm up; their median counts."""
    micro_batch_size: int = 0
    """Rows put through the model at once; 0 takes the shape's."""
    gradient_accumulation: int = 0
    """Micro-batches of a step; 0 takes the shape's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Also write the rows to this file."""


def run(flags: list[str]) -> None:
    given, given_keys = parse_given(Arguments, flags, prog="p828 bench train", description=DESCRIPTION)
    if not given.shape:
        raise ConfigError(f"no --shape given. Usage: {USAGE}\nPresets: {', '.join(preset_names())}")
    for routing in given.routing:
        if routing not in ROUTINGS:
            near = did_you_mean(routing[:80], ROUTINGS)
            raise ConfigError(f"--routing {shown_word(routing)}{near} Accepted: {', '.join(ROUTINGS)}")
    if not 1 <= given.steps <= LARGEST_INT:
        raise ConfigError(f"--steps {shown(given.steps)}: a whole number from 1 to {LARGEST_INT} is accepted")
    if "json" in given_keys:
        check_path("--json", given.json)
    from p828.system.device import pick_device  # imports torch

    device = pick_device(given.device).type
    benchmarks = find_peers() if given.peers else None
    if benchmarks is not None:
        check_peers(given.peers, device, benchmarks)
    shapes = {
        name: load_shape(name, device, given.micro_batch_size, given.gradient_accumulation) for name in given.shape
    }
    bench = Bench(
        device=device,
        peers=given.peers,
        routings=given.routing,
        steps=given.steps,
        has_breakdown=given.breakdown,
        json_path=Path(given.json) if given.json else None,
        benchmarks=benchmarks,
    )
    bench.run(shapes)
