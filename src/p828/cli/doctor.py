"""`p828 doctor`: checks before a run, and what a run's records say after it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from p828.cli.configuration import ConfigArguments, read_configuration
from p828.cli.findings import show_findings
from p828.cli.flags import HELP, parse_given
from p828.cli.run_name import run_of
from p828.cli.status_lines import show_status
from p828.config import Config
from p828.config.files import preset_names
from p828.doctor.check import Check, worst
from p828.errors import ConfigError, RunFailed, warn

USAGE = "p828 doctor [CONFIG | RUN] [--json] [--section.key VALUE ...]"
NONE = "(default: none)"


@dataclass(frozen=True)
class Arguments(ConfigArguments):
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG|RUN", help_behavior_hint=NONE)] = ""
    """A preset or .toml file, to check before it is trained; or a run's directory or name, for what went wrong."""
    json: bool = False
    """Print JSON, and nothing else on standard output."""


def run(arguments: list[str]) -> None:
    """Exit code 1 for a failure or a critical finding."""
    if any(argument in HELP for argument in arguments):
        read_configuration(arguments, Arguments, USAGE, _describe)  # ends with the help
    own, flags = parse_given(Arguments, arguments, prog="p828 doctor", default=Arguments(), is_again=True)
    others = [f"--{key.replace('_', '-')}" for key in flags if key not in ("config", "json")]
    directory = run_of(own.config, "doctor")
    if directory is not None:
        if others:
            raise ConfigError(
                f"{others[0]}: accepted with a configuration; {directory} is a run, whose records are read"
            )
        show_findings(directory, own.json)
        return
    if others and not own.config:
        raise ConfigError(f"{others[0]} changes a configuration, and none is named. Usage: {USAGE}")
    config = None
    if own.config:
        config = read_configuration(arguments, Arguments, USAGE, _describe, reads_prepared=True)[0]
    _show_checks(config, own.json)


def _show_checks(config: Config | None, as_json: bool) -> None:
    checks: list[Check] = []
    for check in _checks(config):
        checks.append(check)
        if not as_json:
            show_status(check.status, check.name, check.text, check.remedy)
    if as_json:
        print(json.dumps({"status": worst(checks), "checks": [asdict(check) for check in checks]}, indent=2))
    failures, warnings = ([one.name for one in checks if one.status == status] for status in ("failure", "warning"))
    if failures:
        raise RunFailed(f"{len(failures)} of {len(checks)} checks failed: {', '.join(failures)}")
    if not as_json:
        print(f"\n{len(checks)} checks: no failure, {len(warnings)} warning{'' if len(warnings) == 1 else 's'}")


def _checks(config: Config | None) -> Iterator[Check]:
    """The versions, and then the rest, for which packages may be missing."""
    try:
        from p828.doctor.versions import check_versions

        yield from check_versions(config)
        from p828.doctor.preflight import preflight  # imports torch and most other packages
    except (ImportError, OSError) as error:
        yield Check(
            "all else", "failure", f"cannot be looked at: {error}", "install what is missing, as with pip install ."
        )
        return
    yield from preflight(config, warn)


def _describe(default: Config) -> str:
    return (
        f"{USAGE}\n\nWithout a name, checks this machine: versions, GPUs, memory, disk, links, rates, and every kernel "
        f"against plain math. With CONFIG, a preset ({', '.join(preset_names())}) or a .toml file, also what that run "
        "needs, its tokenizer and a sample of its data. With RUN, a run's directory or its name under runs/, what its "
        "records say went wrong, and what to do. Exit code 1 on a failure or a critical finding."
    )
