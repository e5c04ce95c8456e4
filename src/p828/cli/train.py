"""`p828 train`: train a model, or go on with its run."""

import tomli_w

from p828 import config as configuration
from p828.cli.configuration import read_configuration
from p828.config import Config
from p828.config_values import to_dict
from p828.model.flops import count_parameters, flops_per_token

USAGE = "p828 train CONFIG [--dry-run] [--section.key VALUE ...]"
DRY_RUN = "--dry-run"
DEEPSPEED_CONFIG = "--deepspeed-config"


def run(arguments: list[str]) -> None:
    flags = [_ours(argument) for argument in arguments if argument != DRY_RUN]
    config = read_configuration(flags, USAGE, _describe, others=(DRY_RUN, DEEPSPEED_CONFIG))
    if DRY_RUN in arguments:
        print(tomli_w.dumps(to_dict(config)).rstrip(), _costs(config), sep="\n\n")
        return
    from p828.train.start import train  # imports torch

    train(config)


def _ours(argument: str) -> str:
    """`--deepspeed_config X`, as programs for DeepSpeed have it, is `--deepspeed.config X`."""
    name, equals, value = argument.partition("=")
    return f"--deepspeed.config{equals}{value}" if name.replace("_", "-") == DEEPSPEED_CONFIG else argument


def _describe(default: Config) -> str:
    return (
        f"{USAGE}\n\nCONFIG is a preset ({', '.join(configuration.preset_names())}) or a .toml file. A run that has "
        "checkpoints goes on from the newest one. --dry-run prints the resolved configuration and ends.\n\n"
        f"{_costs(default)}"
    )


def _costs(config: Config) -> str:
    """Total and active parameters and FLOPs of a configuration."""
    parameters = count_parameters(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    return (
        f"# {parameters.total:,} parameters, {parameters.active:,} active for a token\n"
        f"# {flops / 1e6:,.1f} MFLOPs to train on one token, {flops * config.tokens_per_step / 1e12:,.3g} TFLOPs a step"
        ", with attention over whole rows"
    )
