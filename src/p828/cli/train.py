"""`p828 train`: train a model, or go on with its run."""

import tomli_w

from p828 import config as configuration
from p828.cli.flags import HELP, parse
from p828.config import Config
from p828.errors import UserError
from p828.model.flops import count_parameters, flops_per_token

USAGE = "p828 train CONFIG [--dry-run] [--section.key VALUE ...]"


def run(arguments: list[str]) -> None:
    name, flags = _split(arguments)
    default = Config() if name is None else configuration.load(name)
    dry_run = "--dry-run" in flags
    flags = [flag for flag in flags if flag != "--dry-run"]
    prog, description = f"p828 train {name or 'CONFIG'}", _describe(default)
    config = parse(Config, flags, prog, default, description, others=("--dry-run",))
    if name is None:
        raise UserError(f"no configuration given. Usage: {USAGE}\nPresets: {', '.join(configuration.preset_names())}")
    configuration.validate(config)
    if dry_run:
        print(tomli_w.dumps(configuration.to_dict(config)).rstrip(), _costs(config), sep="\n\n")
        return
    from p828.train.start import train  # imports torch

    train(config)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The configuration, which comes first, and the flags."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if arguments and not any(argument in HELP for argument in arguments):
        raise UserError(f"{arguments[0]} stands where the configuration comes. Usage: {USAGE}")
    return None, arguments


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
    )
