"""What `p828 train` and `p828 prepare` begin with: a preset, TOML file or run, and flags that change it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from p828.cli.flags import HELP, parse_given
from p828.cli.run_name import run_of
from p828.config import Config, load, load_given
from p828.config.files import implied, preset_names
from p828.config.values import changed
from p828.distributed.launcher import Process, launched, report_once
from p828.errors import ConfigError
from p828.train.settled import settled


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
    run_command: str = "",
    process_of: Callable[[A], Process] = lambda _: launched(),
) -> tuple[Config, A]:
    """The named configuration, changed by flags and validated, and all arguments, for the command's own flags.

    `describe` gives the help's text for the unchanged configuration. `others` are flags that the caller has taken out
    before. With `run_command`, the command's name, a run's name under runs/ is taken for its directory. With
    `reads_prepared`, complete prepared data says what it was made from, where that is not given. `process_of` gives,
    from the arguments, the place among the processes that train. Raises ConfigError, also for a key that is given and
    changes nothing.
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
    if run_command and (directory := run_of(own.config, run_command)) is not None:
        own = dataclasses.replace(own, config=str(directory))
    loaded = load_given(own.config)
    report_once(loaded.old_names)
    sections = {f.name for f in dataclasses.fields(Config)}
    flags = {key: value for key, value in flags.items() if key.partition(".")[0] in sections}
    config = changed(loaded.config, {**implied(flags, loaded.given), **flags})
    return settled(config, flags, loaded, process_of(own), reads_prepared), own
