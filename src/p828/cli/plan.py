"""`p828 plan`: what a run takes before it is started."""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from p828.cli.configuration import ConfigArguments, read_configuration
from p828.config import Config, with_steps, with_vocabulary
from p828.config.files import preset_names
from p828.distributed.engine_of_processes import for_processes
from p828.distributed.launcher import Process
from p828.errors import ConfigError
from p828.plan.advice import advise
from p828.plan.plan import Machine, make_plan
from p828.plan.table import sentence, show
from p828.runs import records
from p828.runs.file_names import RECORDS_FILE
from p828.system.cards import CARDS, card

USAGE = "p828 plan CONFIG [--gpus N] [--gpu NAME] [--json] [--section.key VALUE ...]"
LAST_STEPS = 100  # of a run, whose median is its rate
READ_BYTES = 2**26  # of the end of its records
MOST_GPUS = 2**20
WIDEST = 80


@dataclass(frozen=True)
class Arguments(ConfigArguments):
    gpus: int = 1
    """GPUs in all, of one kind."""
    hosts: int = 1
    """Hosts that have them, each as many."""
    gpu: str = "h100"
    """Their kind, as h100, h200, a100, 4090 or 5090."""
    mfu: float = 0.0
    """Share of the GPU's datasheet that training reaches; 0: what the run measured, or p828 on an H100."""
    gpu_hour_price: float = 0.0
    """Price of a GPU for an hour, in any currency."""
    kilowatt_hour_price: float = 0.0
    """Price of a kilowatt-hour, in the same."""
    json: bool = False
    """Print the plan as JSON and nothing else."""


def run(arguments: list[str]) -> None:
    config, given = read_configuration(
        arguments, Arguments, USAGE, _describe, reads_prepared=True, run_command="plan", process_of=_trained_by
    )
    machine = _machine(given)
    if machine.gpus == 1:
        config = for_processes(config, 1)
    config = with_vocabulary(with_steps(config, 1 if config.engine == "plain" else machine.gpus))
    plan = make_plan(config, machine)
    advice = advise(plan)
    if given.json:
        advised = {**advice.to_json(), "sentence": sentence(plan, advice)}
        print(json.dumps({**plan.to_json(), "advice": advised}, indent=1))
    else:
        print(show(plan, advice, min(shutil.get_terminal_size().columns, WIDEST)))


def _trained_by(given: Arguments) -> Process:
    """One of the processes that would train on these GPUs; on a single one it needs no launcher."""
    return Process(size=max(given.gpus, 1), is_launched=given.gpus > 1)


def _machine(given: Arguments) -> Machine:
    """Raises ConfigError for a number that is none of GPUs, a share or a price."""
    if not 1 <= given.gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus {given.gpus}: a whole number from 1 is accepted")
    if given.hosts < 1 or given.gpus % given.hosts:
        raise ConfigError(f"--hosts {given.hosts}: a whole number that divides --gpus {given.gpus} is accepted")
    if not 0 <= given.mfu <= 1:
        raise ConfigError(f"--mfu {given.mfu}: a share between 0 and 1 is accepted")
    for name in ("gpu_hour_price", "kilowatt_hour_price"):
        price = getattr(given, name)
        if not 0 <= price < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {price}: a number of at least 0 is accepted")
    rate, rate_from = (
        (given.mfu, "as given") if given.mfu else (_rate_of_run(Path(given.config)), "measured in this run")
    )
    rate_from = rate_from if rate else ""
    return Machine(
        card(given.gpu), given.gpus, rate, rate_from, given.gpu_hour_price, given.kilowatt_hour_price, given.hosts
    )


def _rate_of_run(path: Path) -> float:
    """The MFU that the last steps of a run's directory had in the median; 0 for no run, and for one on a CPU."""
    if not (path / RECORDS_FILE).is_file():
        return 0.0
    found: list[float] = []
    steps = 0
    for line in reversed(records.tail(path / RECORDS_FILE, READ_BYTES)):
        record = records.parsed(line) or {}
        if record.get("kind") != "step":
            continue
        rate, steps = records.number(record.get("mfu")), steps + 1
        if rate is not None and 0 < rate <= 1:  # false for NaN
            found.append(rate)
        if steps == LAST_STEPS:
            break
    return statistics.median(found) if found else 0.0


def _describe(default: Config) -> str:
    return (
        f"{USAGE}\n\nWhat a run takes on GPUs that need not be here: parameters, FLOPs, memory by part for each "
        "engine, time, bytes over the links, epochs, energy, and how it had best be trained. "
        f"CONFIG is a preset ({', '.join(preset_names())}), a .toml file, or a run's directory or name. "
        f"GPUs: {', '.join(one.name for one in CARDS)}."
    )
