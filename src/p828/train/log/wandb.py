"""What Weights & Biases gets of a run's records, through its own library."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from p828.config import Config
from p828.config.values import to_dict
from p828.errors import ConfigError
from p828.runs.file_names import WANDB_ID_FILE
from p828.train.log.board_id import board_id
from p828.train.log.panels import ALERT_LEVELS, SAMPLES, alert_text

STEP = "step"
SENT_WITHIN = 45  # seconds to send what is left, or it stays on the disk; less than p828 waits for a tracker
CORE = "wandb-core"  # its process


class WandbTracker:
    """The W&B run, begun or continued, of a run's directory, which holds its id.

    Where W&B cannot be reached the run is recorded offline, and `problem` says so.

    W&B's own steps only grow, and it drops rows of earlier ones. So a row has its step in a column, which is the
    horizontal axis of all charts: after a rollback or a resume the steps that come again are there, and come last.
    """

    key, name = "wandb", "Weights & Biases"

    def __init__(self, run_dir: Path, config: Config) -> None:
        self.run_dir, self.config = run_dir, config
        self.where, self.problem = "", ""
        self._run: Any = None
        self._newest = 0  # step of the run in the last row
        self._shift = 0  # what is added to a step of the run for a step of W&B's, which never goes back
        self._row = 0  # step of W&B's in the last row

    def import_library(self) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f'wandb.mode = "{self.config.wandb.mode}": wandb cannot be imported: {error}\npip install wandb'
            ) from None

    def start(self) -> None:
        """Raises ConfigError when W&B refuses the key, or has none, or a setting, when the file with the id holds none,
        and when the directory cannot be written.
        """
        self.import_library()
        import wandb

        mode = self.config.wandb.mode
        try:
            try:
                self._start(mode)
            except wandb.errors.AuthenticationError:
                raise
            except wandb.errors.CommError as error:
                wandb.teardown()  # else the id is still in use
                self._start("offline")
                self.problem = (
                    f"Weights & Biases cannot be reached ({_line(error)}); recorded offline, "
                    f"for `wandb sync {self.run_dir}/wandb/offline-run-*`"
                )
        except wandb.errors.Error as error:
            raise ConfigError(
                f'wandb.mode = "{mode}": Weights & Biases does not start: {_line(error)}\n'
                'run `wandb login` or set WANDB_API_KEY, or give wandb.mode "offline" or "off"'
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.run_dir / 'wandb'}: cannot be written: {error.strerror or error}") from None
        except ValueError as error:  # of its settings, which it takes from the environment, too
            raise ConfigError(
                f"Weights & Biases does not take a setting, maybe a variable WANDB_… of the environment: {_line(error)}"
            ) from None

    def write(self, step: int, numbers: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        values = dict[str, Any](numbers)
        for name, load_E in loads.items():
            values |= _by_expert(name, load_E)
        self._log(step, values)

    def samples(self, step: int, samples: Sequence[Sequence[str]]) -> None:
        import wandb

        self._log(step, {SAMPLES: wandb.Table(["prompt", "continuation"], [list(sample) for sample in samples])})

    def alert(self, step: int, finding: Mapping[str, Any]) -> None:
        """Tell of a finding as W&B tells its users: in the run's page, and by mail or Slack as they have set it."""
        level = ALERT_LEVELS[finding["severity"]]
        self._run.alert(finding["rule"], alert_text(finding), level=level, wait_duration=0)

    def rewind(self, step: int) -> None:
        """Nothing: `write` sees that a step comes again."""

    def update(self, config: Config) -> None:
        self._run.config.update(to_dict(config), allow_val_change=True)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def abandon(self) -> None:
        """End W&B's process, which does not answer: its library would wait for it when p828 ends."""
        import wandb

        with suppress(psutil.Error):
            for child in psutil.Process(os.getpid()).children():
                if child.name() == CORE:
                    child.kill()
        with suppress(wandb.errors.Error, OSError, SystemExit):  # it would exit with the killed process's code
            wandb.teardown()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step < self._newest or step + self._shift < self._row:
            self._shift = self._row + 1 - step
        self._newest, self._row = step, step + self._shift
        self._run.log({STEP: step, **values}, step=self._row)

    def _start(self, mode: str) -> None:
        import wandb

        # silent: nothing is printed through the progress bar, and no terminal is asked for a key
        wandb.setup(wandb.Settings(silent=True, console="off"))
        self._run = wandb.init(
            project=self.config.wandb.project,
            name=self.config.name,
            id=board_id(self.run_dir / WANDB_ID_FILE, self.name),
            dir=self.run_dir,
            mode="online" if mode == "online" else "offline",
            resume="allow",
            config=to_dict(self.config),
            settings=wandb.Settings(finish_timeout=SENT_WITHIN),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self.where, self._row = self._run.url or f"offline, in {self.run_dir}/wandb", self._run.step


def _by_expert(name: str, load_E: Sequence[int]) -> dict[str, Any]:
    """A histogram over the experts' numbers, whose bar n has what expert n got, by its name in W&B.

    A histogram of W&B's has a largest number of bars. More experts get several: `NAME/experts_0_to_511` and so on.
    """
    import wandb

    most = wandb.Histogram.MAX_LENGTH
    found = {}
    for first in range(0, len(load_E), most):
        load_of_part_E = load_E[first : first + most]
        end = first + len(load_of_part_E)
        part = name if len(load_E) <= most else f"{name}/experts_{first}_to_{end - 1}"
        found[part] = wandb.Histogram(np_histogram=(load_of_part_E, [*range(first, end + 1)]))
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
