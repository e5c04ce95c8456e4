"""What `p828 train` and `p828 prepare` begin with: a preset or TOML file, and flags that change it."""

import dataclasses
from collections.abc import Callable

from p828 import config as configuration
from p828.cli.flags import HELP, parse
from p828.config import Config
from p828.errors import UserError


def read_configuration(
    arguments: list[str], usage: str, describe: Callable[[Config], str], others: tuple[str, ...] = ()
) -> Config:
    """The configuration named first, changed by the flags behind it, and validated.

    `describe` gives the help's text for the unchanged one. `others` are flags that the caller has taken out before.
    Raises UserError.
    """
    name, flags = _split(arguments, usage)
    default = Config() if name is None else configuration.load(name)
    prog = f"{' '.join(usage.split()[:2])} {name or 'CONFIG'}"
    config = parse(Config, flags, prog, default, describe(default), others=others)
    if name is None:
        raise UserError(f"no configuration given. Usage: {usage}\nPresets: {', '.join(configuration.preset_names())}")
    config = _with_length(config, default)
    configuration.validate(config)
    return config


def _with_length(config: Config, default: Config) -> Config:
    """Where flags give `train.steps`, they and not the file's `train.tokens` decide. Raises UserError for both."""
    train, before = config.train, default.train
    if not train.tokens or train.steps == before.steps:
        return config
    if train.tokens != before.tokens:
        raise UserError(
            f"--train.steps {train.steps} and --train.tokens {train.tokens:g}: one of them decides; give one"
        )
    return dataclasses.replace(config, train=dataclasses.replace(train, tokens=0.0))


def _split(arguments: list[str], usage: str) -> tuple[str | None, list[str]]:
    """The configuration, which comes first, and the flags."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if arguments and not any(argument in HELP for argument in arguments):
        raise UserError(f"{arguments[0]} stands where the configuration comes. Usage: {usage}")
    return None, arguments
