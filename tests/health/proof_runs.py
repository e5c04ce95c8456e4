"""Makes the runs of the proof, each in a process of its own."""

import functools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import tomli_w
from all_faults import FAULTS
from cases import STRIKES_AT, Fault, Healthy, Settings, Strength, base, joined
from child import start
from healthy import HEALTHY

from p828.health.finding import Finding
from p828.health.of_run import findings_of
from p828.runs import records
from p828.runs.file_names import RECORDS_FILE

RUN_WITHIN = 1800  # seconds, on a machine that does other things, too
ENDED_WITHIN = 60  # seconds that other ranks may take longer than rank 0
LOOK_EVERY = 0.2  # seconds
FOUND = ".found.json"  # beside a run that was judged while it hung


@dataclass(frozen=True)
class ProofRun:
    """A fault at one strength with one seed; or a healthy run."""

    case: Fault | Healthy
    strength: int
    """Number of the strength among the fault's."""
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        words = f"{self.case.name} {self.shown_strength} {self.seed}"
        return "-".join(re.findall(r"[\w.]+", words))

    @property
    def is_healthy(self) -> bool:
        return isinstance(self.case, Healthy)

    @property
    def rules(self) -> tuple[str, ...]:
        """That name what is broken."""
        return self.case.rules if isinstance(self.case, Fault) else ()

    @property
    def words(self) -> str:
        """That the evidence has to have."""
        return self.case.words if isinstance(self.case, Fault) else ""

    @property
    def shown_strength(self) -> str:
        strength = self.strength_value
        return strength if isinstance(strength, str) else f"{strength:.3g}"

    @property
    def strength_value(self) -> Strength:
        return "" if isinstance(self.case, Healthy) else self.case.strengths[self.strength]

    def changes(self, corpus: Path) -> Settings:
        """What the run's configuration has in place of `base`."""
        case = self.case
        return case.settings(corpus) if isinstance(case, Healthy) else case.settings(self.strength_value, corpus)

    @property
    def cannot(self) -> str:
        """Why the run cannot be made here; empty if it can."""
        return "mounting a tmpfs is not permitted here" if self.has_own_disk and not may_mount() else ""

    def make(self, corpus: Path, directory: Path) -> Path:
        """The run's directory, once the run has ended. What it printed is beside it, in NAME.log."""
        settings = joined(base(corpus), self.changes(corpus), {"train": {"seed": self.seed}})
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / f"{self.name}.toml"
        config.write_text(tomli_w.dumps({"name": self.name, "runs_dir": str(directory), **settings}))
        log, run = directory / f"{self.name}.log", directory / self.name
        if self.case.is_resumed:
            sound = None if isinstance(self.case, Fault) else 0
            (first,) = start(config, self.case.name, sound, log)
            wait_for_step(first, run, STRIKES_AT)
            first.terminate()
            first.join(RUN_WITHIN)
        with own_disk(run, self.strength_value) if self.has_own_disk else nullcontext():
            processes = start(config, self.case.name, self.strength, log, self.case.ranks)
            if isinstance(self.case, Fault) and self.case.hangs:
                wait_for_finding(processes[0], run, self.case.rules)
            else:
                processes[0].join(RUN_WITHIN)
            for process in processes[1:]:
                process.join(ENDED_WITHIN)
            for process in processes:
                process.kill()
                process.join()
        return run

    @property
    def has_own_disk(self) -> bool:
        return isinstance(self.case, Fault) and self.case.has_own_disk


def wait_for_step(process: ForkServerProcess, run: Path, step: int) -> None:
    """Wait until the run has recorded a step."""
    while process.is_alive():
        if (run / RECORDS_FILE).exists() and any(record["step"] >= step for record in records.read(run / RECORDS_FILE)):
            return
        process.join(LOOK_EVERY)
    raise AssertionError(f"{run} ended before step {step}")


def wait_for_finding(process: ForkServerProcess, run: Path, rules: Sequence[str]) -> None:
    """Wait until the run's records tell one of the rules, and write down what is found while the process is there."""
    end, found = time.monotonic() + RUN_WITHIN, list[Finding]()
    while process.is_alive() and time.monotonic() < end and not any(finding.rule in rules for finding in found):
        process.join(LOOK_EVERY * 10)
        found = findings_of(run) if (run / RECORDS_FILE).exists() else []
    run.with_name(run.name + FOUND).write_text(json.dumps([finding.to_json() for finding in found]))


@functools.cache
def may_mount() -> bool:
    """Whether a small tmpfs can be mounted, which takes root, and a container that lets it."""
    with tempfile.TemporaryDirectory() as place:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            return False
        subprocess.run(["umount", "-l", place], check=True)
        return True


@contextmanager
def own_disk(run: Path, megabytes: Strength) -> Iterator[None]:
    """A disk of that size in place of the run's directory, whose content stays when it is gone."""
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes:g}m", "tmpfs", str(run)], check=True)
    try:
        yield
        shutil.copytree(run, beside := run.with_name(f".{run.name}"))
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)
    run.rmdir()
    beside.rename(run)


def proof_runs() -> list[ProofRun]:
    """All of them: the faults in their order, then the healthy runs."""
    broken = [ProofRun(fault, strength, seed) for fault in FAULTS for strength, seed in _strengths_and_seeds(fault)]
    return broken + [ProofRun(case, 0, case.seed) for case in HEALTHY]


def _strengths_and_seeds(fault: Fault) -> list[tuple[int, int]]:
    """Every strength with a seed of its own; one that has no strengths with two seeds."""
    count = len(fault.strengths)
    return [(strength, strength) for strength in range(count)] if count > 1 else [(0, 0), (0, 1)]
