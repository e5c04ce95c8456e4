"""What `p828 train` and `p828 prepare` begin with: a preset, TOML file or run, and flags that change it."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from p828.cli.flags import HELP, changed, parse_given, report_once
from p828.cli.given import check_given
from p828.config import Config, load, load_given, validate, with_steps
from p828.config.files import implied, preset_names
from p828.errors import ConfigError


@dataclass(frozen=True)
class ConfigArguments(Config):
    """A configuration's flags, and the configuration that they change. A command adds flags of its own."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG", help_behavior_hint="(required)")] = ""
    """A preset, a .toml file, or the directory of a run."""


A = TypeVar("A", bound=ConfigArguments)


def read_configuration(
    arguments: list[str],
    cls: type[A],
    usage: str,
    describe: Callable[[Config], str],
    others: tuple[str, ...] = (),
    reads_prepared: bool = False,
) -> tuple[Config, A]:
    """The named configuration, changed by flags and validated, and all arguments, for the command's own flags.

    `describe` gives the help's text for the unchanged configuration. `others` are flags that the caller has taken out
    before. With `reads_prepared`, complete prepared data says what it was made from, where that is not given. Raises
    ConfigError, also for a key that is given and changes nothing.
    """
    prog = " ".join(usage.split()[:2])
    if any(argument in HELP for argument in arguments):
        name = arguments[0] if not arguments[0].startswith("-") else ""
        default = load(name) if name else Config()
        values = {f.name: getattr(default, f.name) for f in dataclasses.fields(Config)}
        parse_given(cls, arguments, prog, cls(**values, config=name), describe(default), others)  # ends with the help
    own, flags = parse_given(cls, arguments, prog, cls(), others=others)
    if not own.config:
        raise ConfigError(f"no configuration given. Usage: {usage}\nPresets: {', '.join(preset_names())}")
    loaded, in_files, old_names = load_given(own.config)
    report_once(old_names)
    sections = {f.name for f in dataclasses.fields(Config)}
    flags = {key: value for key, value in flags.items() if key.partition(".")[0] in sections}
    config = _with_length(changed(loaded, {**implied(flags, in_files), **flags}), flags)
    if reads_prepared and any(source.prepared for source in config.data.sources):
        from p828.data.tokens.settings import with_prepared_sources  # with what it reads tokens by

        config = with_prepared_sources(config, {*flags, *in_files})
    validate(config)
    check_given(with_steps(config, 1), flags, loaded, in_files)
    return config, own


def _with_length(config: Config, flags: Collection[str]) -> Config:
    """Where flags give `train.steps`, they and not the file's `train.tokens` decide. Raises ConfigError for both."""
    train = config.train
    if not train.tokens or "train.steps" not in flags:
        return config
    if "train.tokens" in flags:
        raise ConfigError(
            f"--train.steps {train.steps} and --train.tokens {train.tokens:g}: one of them decides; give one"
        )
    return dataclasses.replace(config, train=dataclasses.replace(train, tokens=0.0))
