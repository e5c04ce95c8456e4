"""Makes the runs of the proof, each in a process of its own."""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from all_faults import FAULTS
from cases import STRIKES_AT, Fault, Healthy, Settings, Strength, base, joined
from healthy import HEALTHY

from runs import start, wait_for_step

CHILD = str(Path(__file__).with_name("child.py"))
RUN_WITHIN = 600  # seconds


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
    def shown_strength(self) -> str:
        strength = self.strength_value
        return strength if isinstance(strength, str) else f"{strength:.3g}"

    def make(self, corpus: Path, directory: Path) -> Path:
        """The run's directory, once the run has ended. What it printed is beside it, in NAME.log."""
        settings = joined(base(corpus), self.changes(corpus), {"train": {"seed": self.seed}})
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / f"{self.name}.toml"
        config.write_text(tomli_w.dumps({"name": self.name, "runs_dir": str(directory), **settings}))
        with (directory / f"{self.name}.log").open("w") as log:
            for text in self._starts(config, directory):
                log.write(text)
        return directory / self.name

    @property
    def strength_value(self) -> Strength:
        return "" if isinstance(self.case, Healthy) else self.case.strengths[self.strength]

    def changes(self, corpus: Path) -> Settings:
        """What the run's configuration has in place of `base`."""
        case = self.case
        return case.settings(corpus) if isinstance(case, Healthy) else case.settings(self.strength_value, corpus)

    def _starts(self, config: Path, directory: Path) -> Iterator[str]:
        """Start the run once or several times, and give what each start printed."""
        case = self.case
        if isinstance(case, Healthy) and case.is_resumed:
            first = start(str(config), case.name, "0", cwd=directory, launcher=(CHILD,))
            wait_for_step(first, STRIKES_AT)
            first.send_signal(signal.SIGTERM)
            yield "".join(first.communicate(timeout=RUN_WITHIN))
        starts = case.starts if isinstance(case, Fault) else ((),)
        for number, flags in enumerate(starts, start=1):
            broken = (CHILD, str(config), case.name, str(self.strength))
            sound = ("-m", "p828", "train", str(config))
            launcher = broken if number == len(starts) else sound
            process = start(*flags, cwd=directory, launcher=launcher)
            out, error = process.communicate(timeout=RUN_WITHIN)
            yield f"{out}{error}exit code {process.returncode}\n"


def proof_runs() -> list[ProofRun]:
    """All of them: the faults in their order, then the healthy runs."""
    broken = [
        ProofRun(fault, strength, seed)
        for fault in FAULTS
        for strength in range(len(fault.strengths))
        for seed in fault.seeds
    ]
    return broken + [ProofRun(case, 0, case.seed) for case in HEALTHY]
