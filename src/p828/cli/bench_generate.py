"""`p828 bench generate`: how fast this machine continues prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from p828.bench.generate import GenerateBench
from p828.bench.generation.workload import FIRST_TOKEN_PROMPTS, RECOMPUTED, Workload
from p828.bench.peers import check_peers, find_peers
from p828.bench.systems import load_shape
from p828.cli.flags import parse_given
from p828.config.files import preset_names
from p828.config.rules import check_path
from p828.config.values import shown
from p828.errors import ConfigError

USAGE = (
    "p828 bench generate --shape NAME [NAME ...] [--batch N ...] [--prompt-length N] [--new-tokens N] "
    "[--peers NAME ...] [--json FILE]"
)
DESCRIPTION = (
    f"{USAGE}\n\nTimes how prompts of random tokens are continued by models with random weights, every system in a "
    "fresh process, one after another: p828's decoder, and other libraries on the same model. The clock runs while "
    "whole batches are continued: their prompts are read before, and what is compiled or captured is so before. The "
    f"time to the first token after {FIRST_TOKEN_PROMPTS[0]:,} and {FIRST_TOKEN_PROMPTS[1]:,} tokens comes besides, "
    f"and a step with the cache at {RECOMPUTED:,} tokens beside reading all of them again."
)
BATCHES = {"cuda": (1, 4, 16, 64, 256), "cpu": (1, 4, 16)}
MOST = {"batch": 4096, "prompt_length": 2**17, "new_tokens": 2**16}


@dataclass(frozen=True)
class Arguments:
    shape: tuple[str, ...] = ()
    """Presets or .toml files: the model's sizes."""
    batch: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: 1 4 16, on a GPU also 64 256)")] = ()
    """Sequences that are continued together."""
    prompt_length: int = 512
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Steps timed, each of which gives every sequence a token."""
    peers: tuple[str, ...] = ()
    """transformers, llama.cpp, in the repository. All systems then compute the same model, which has no sinks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Also write the rows to this file."""


def run(flags: list[str]) -> None:
    given, given_keys = parse_given(Arguments, flags, prog="p828 bench generate", description=DESCRIPTION)
    if not given.shape:
        raise ConfigError(f"no --shape given. Usage: {USAGE}\nPresets: {', '.join(preset_names())}")
    if "batch" in given_keys and not given.batch:
        raise ConfigError("--batch is empty: whole numbers are accepted, as 1 16 64")
    for key, numbers in (
        ("batch", given.batch), ("prompt_length", (given.prompt_length,)), ("new_tokens", (given.new_tokens,)),
    ):  # fmt: skip
        for number in numbers:
            if not 1 <= number <= MOST[key]:
                flag = f"--{key.replace('_', '-')}"
                raise ConfigError(f"{flag} {shown(number)}: a whole number from 1 to {MOST[key]} is accepted")
    if "json" in given_keys:
        check_path("--json", given.json)
    from p828.system.device import pick_device  # imports torch

    device = pick_device(given.device).type
    benchmarks = find_peers() if given.peers else None
    if benchmarks is not None:
        check_peers(given.peers, device, benchmarks, "generators")
    bench = GenerateBench(
        device=device,
        peers=given.peers,
        work=Workload(given.batch or BATCHES[device], given.prompt_length, given.new_tokens),
        json_path=Path(given.json) if given.json else None,
        benchmarks=benchmarks,
    )
    bench.run({name: load_shape(name, device, 0, 0) for name in given.shape})
