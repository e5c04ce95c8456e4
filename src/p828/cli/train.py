"""`p828 train`: train a model, or go on with its run."""

import os
from dataclasses import dataclass

import tomli_w

from p828.api import train_run
from p828.cli.configuration import ConfigArguments, read_configuration
from p828.cli.presets import presets_table
from p828.config import Config, rules, with_steps, with_vocabulary
from p828.config.files import preset_names
from p828.config.values import to_dict
from p828.errors import ConfigError
from p828.interchange.architectures.llama_cpp import gguf_line
from p828.interchange.architectures.native import export_line
from p828.model.costs import count_parameters, flops_per_token

USAGE = "p828 train CONFIG [--dry-run] [--presets] [--section.key VALUE ...]"
DEEPSPEED_CONFIG = "--deepspeed-config"


@dataclass(frozen=True)
class Arguments(ConfigArguments):
    dry_run: bool = False
    """Print the resolved configuration with its parameters and FLOPs, and end."""
    presets: bool = False
    """Print what presets there are, and end."""


def run(arguments: list[str]) -> None:
    flags = [_ours(argument) for argument in arguments]
    if any(flag.partition("=")[0] == "--presets" for flag in flags):
        if len(flags) > 1:
            raise ConfigError("--presets: accepted alone, as p828 train --presets")
        print(presets_table())
        return
    config, given = read_configuration(flags, Arguments, USAGE, _describe, (DEEPSPEED_CONFIG,), reads_prepared=True)
    if given.dry_run:
        config = with_vocabulary(with_steps(config, 1))
        remarks = [*rules.remarks(config), export_line(config.model), gguf_line(config.model)]
        lines = "\n".join([_costs(config), *(f"# {line}" for line in remarks)])
        print(tomli_w.dumps(to_dict(config)).rstrip(), lines, sep="\n\n")
        return
    _let_threads_sleep()
    train_run(config)


def _let_threads_sleep() -> None:
    """Have a thread of PyTorch's on a CPU look 1,000 times whether the others are done, and then sleep.

    With libgomp's 300,000 times a thread that waits takes the processor from the thread it waits for, where other
    programs are busy: training gets many times as slow. On idle cores 1,000 cost little. They are libgomp's own where
    it knows of more threads than processors. It reads the variable when PyTorch is imported; what a user has set is
    kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _ours(argument: str) -> str:
    """`--deepspeed_config X`, as programs for DeepSpeed have it, is `--deepspeed.config X`."""
    name, equals, value = argument.partition("=")
    return f"--deepspeed.config{equals}{value}" if name.replace("_", "-") == DEEPSPEED_CONFIG else argument


def _describe(default: Config) -> str:
    """With the sizes of the configuration that was named, if one was."""
    sizes = f"\n\n{_costs(default)}" if default != Config() else ""
    return (
        f"{USAGE}\n\nCONFIG is a preset ({', '.join(preset_names())}), a .toml file or a run's "
        "directory, as runs/NAME. A run that has checkpoints goes on from the newest one."
        f"{sizes}"
    )


def _costs(config: Config) -> str:
    """Total and active parameters and FLOPs of a configuration."""
    config = with_vocabulary(config)
    parameters = count_parameters(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    return (
        f"# {parameters.total:,} parameters, {parameters.active:,} active for a token\n"
        f"# {flops / 1e6:,.1f} MFLOPs to train on one token, {flops * config.tokens_per_step / 1e12:,.3g} TFLOPs a step"
        ", with attention over whole rows"
    )
