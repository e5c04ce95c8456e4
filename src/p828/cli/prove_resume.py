"""`p828 prove-resume`: show that a run of this configuration survives being killed."""

import itertools
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p828.cli.configuration import ConfigArguments, read_configuration
from p828.cli.flags import parse_given, shown_word
from p828.config import Config, with_steps
from p828.config.files import preset_names
from p828.config.values import flatten, shown
from p828.errors import ConfigError, RunFailed
from p828.train.log.console import say

if TYPE_CHECKING:  # imports PyTorch
    from p828.verify.kill_resume import KillResumeCheck

USAGE = "p828 prove-resume CONFIG [--kills N] [--seed N] [--ranks N [--resume-ranks N,N,...]] [--section.key VALUE ...]"
KILLS = 3
TOLERANCE = 0.01  # nats between losses whose sums were in another order; in float32 some 1e-6


@dataclass(frozen=True)
class Arguments(ConfigArguments):
    kills: int = KILLS
    """Kills, at random moments; at least 2."""
    seed: str = ""
    """A whole number that draws when the kills come, the same ones each time; else one is drawn, and printed."""
    ranks: int = 0
    """Processes that train each run together, with --engine sharded or deepspeed; 0 starts no launcher."""
    resume_ranks: str = ""
    """Processes after each kill in turn, as 2,4."""


def run(arguments: list[str]) -> None:
    config, given = read_configuration(arguments, Arguments, USAGE, _describe)
    kills, ranks = _at_least(2, "--kills", given.kills), _at_least(0, "--ranks", given.ranks)
    ranks_after = [_number("--resume-ranks", text, 1) for text in given.resume_ranks.split(",") if text]
    if ranks_after and not ranks:
        raise ConfigError("--resume-ranks: accepted with --ranks")
    if ranks and config.engine == "plain":
        raise ConfigError(f'--ranks {ranks}: accepted with --engine sharded or deepspeed; engine = "plain"')
    micro_batches = config.train.gradient_accumulation * ranks
    for number in ranks_after:
        if micro_batches % number:
            raise ConfigError(
                f"--resume-ranks {number}: a divisor of a step's {micro_batches} micro-batches is accepted"
            )
    seed = _number("--seed", given.seed, 0) if given.seed else None
    _, flags = parse_given(Arguments, arguments, "p828 prove-resume", Arguments(), is_again=True)
    _prove(with_steps(config, max(ranks, 1)), flags, kills, seed, ranks, ranks_after)


def _prove(
    config: Config, flags: Collection[str], kills: int, seed: int | None, ranks: int, ranks_after: list[int]
) -> None:
    say(f"{config.name}: loading PyTorch")
    from p828.verify.kill_resume import KillResumeCheck, ending_on_signals, shortened

    _check_given(config, shortened(config, Path()), flags)
    directory = _fresh_directory(Path(config.runs_dir).absolute(), f"{config.name}-prove-resume")
    check = KillResumeCheck(shortened(config, directory), directory, kills, ranks, ranks_after, say, seed)
    with ending_on_signals():
        try:
            check.run()
            verdict = _verdict(check, is_exact=set(ranks_after) <= {ranks})
        except (KeyboardInterrupt, SystemExit):
            shutil.rmtree(directory)
            raise
    shutil.rmtree(directory)
    print(verdict)


def _verdict(check: "KillResumeCheck", is_exact: bool) -> str:
    """What the two runs have in common. Raises RunFailed if they differ."""
    saving = f"{check.killed} kills, {check.kills_while_saving} of them while a checkpoint was written"
    if is_exact:
        difference = check.difference()
        verdict = f"the same, bit for bit, through {saving}: weights, optimizer, bias, random states, data, records"
    else:
        distance, difference = check.distance()
        if difference is None and not distance <= TOLERANCE:
            difference = f"losses are up to {distance:.2g} nats apart"
        verdict = f"the same data in the same order, and losses at most {distance:.2g} nats apart, through {saving}"
    if difference is not None:
        raise RunFailed(
            f"NOT the same, through {saving}: {difference}\n"
            f"Both runs are in {check.directory}; --seed {check.seed} draws the same kills"
        )
    return verdict


def _check_given(config: Config, proved: Config, flags: Collection[str]) -> None:
    """Raises ConfigError for a flag that the proof has a value of its own for."""
    given, own = flatten(config), flatten(proved)
    for key in given:
        is_given = key in flags or (key == "train.steps" and "train.tokens" in flags)
        if is_given and key != "runs_dir" and given[key] != own[key]:
            accepted = f"at most {own[key]}" if key == "train.steps" else shown(own[key])
            raise ConfigError(f"{key} = {shown(given[key])}: in a proof {accepted} is accepted")


def _fresh_directory(runs: Path, name: str) -> Path:
    """One of its own for this proof, made just now: what a failed one has left is kept. Raises ConfigError."""
    for number in itertools.count(1):
        directory = runs / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            if not directory.exists():
                raise ConfigError(f"{runs}: a directory is accepted as runs_dir") from None
            say(f"{directory} is left from another proof, and stays as it is")
        except OSError as error:
            raise ConfigError(f"{directory}: cannot be written: {error.strerror}") from None
        else:
            return directory
    raise AssertionError


def _at_least(lowest: int, name: str, number: int) -> int:
    if number < lowest:
        raise ConfigError(f"{name} {number}: a whole number of at least {lowest} is accepted")
    return number


def _number(name: str, text: str, lowest: int) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < lowest:
        raise ConfigError(f"{name} {shown_word(text)}: a whole number of at least {lowest} is accepted")
    return int(text)


def _describe(default: Config) -> str:
    return (
        f"{USAGE}\n\nCONFIG is a preset ({', '.join(preset_names())}), a .toml file or a run's "
        f"directory. Trains a short run at once, and again through kills (--kills, {KILLS} unless given) at random "
        "moments, which --seed draws again, resumed after each; then compares every bit of weights, optimizer, bias, "
        "random states, place in the data and records. With --ranks and --engine sharded both run on that "
        "number of processes; resumed on other numbers of them (--resume-ranks), data is compared exactly and losses "
        "within a tolerance. Exit code 1 if they differ."
    )
