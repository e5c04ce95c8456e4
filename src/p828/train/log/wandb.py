"""What Weights & Biases gets of a run's records. The run does not depend on it."""

import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from p828.config import Config
from p828.config.values import to_dict
from p828.errors import ConfigError
from p828.files import read_limited, write_atomic
from p828.runs.file_names import WANDB_ID_FILE

SECTIONS = {
    "step": "train",
    "eval": "validation",
    "probe": "health",
    "tasks": "tasks",
}  # the kinds of records that it sees, and its names for them
FINDING = "finding"  # a record of this kind becomes an alert
ALERT_LEVELS = {"critical": "ERROR", "warning": "WARN", "note": "INFO"}
STEP = "step"
LONGEST_ID = 128  # bytes
FINISH_WITHIN = 60  # seconds to send what is left, or it stays on the disk


def open_mirror(run_dir: Path, config: Config) -> "WandbMirror | None":
    """None if the configuration asks for none. Raises ConfigError as `WandbMirror` does."""
    return None if config.wandb.mode == "off" else WandbMirror(run_dir, config)


class WandbMirror:
    """The W&B run, begun or continued, of a run's directory, which holds its id.

    Where W&B cannot be reached the run is recorded offline; where it fails later, it is left alone. `problem` says so.
    Raises ConfigError when W&B refuses the key, or has none, or a setting, when the file with the id has none, and when
    the directory cannot be written.

    W&B's own steps only grow, and it drops rows of earlier ones. So a row has its step in a column, which is the
    horizontal axis of all charts: after a rollback or a resume the steps that come again are there, and come last.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        import wandb

        self._run: Any = None
        self._newest = 0  # step of the run in the last row
        self._shift = 0  # what is added to a step of the run for a step of W&B's, which never goes back
        self._row = 0  # step of W&B's in the last row
        self.url: str | None = None
        """Where the run is shown; None offline."""
        self._errors = (wandb.errors.Error, OSError)
        self.problem = ""
        self._id = _run_id(run_dir / WANDB_ID_FILE)
        try:
            try:
                self._run = self._start(run_dir, config, config.wandb.mode)
            except wandb.errors.AuthenticationError:
                raise
            except wandb.errors.CommError as error:
                wandb.teardown()  # else the id is still in use
                self._run = self._start(run_dir, config, "offline")
                self.problem = (
                    f"Weights & Biases cannot be reached ({_line(error)}); recorded offline, "
                    f"for `wandb sync {run_dir}/wandb/offline-run-*`"
                )
        except wandb.errors.Error as error:
            raise ConfigError(
                f'wandb.mode = "{config.wandb.mode}": Weights & Biases does not start: {_line(error)}\n'
                'run `wandb login` or set WANDB_API_KEY, or give wandb.mode "offline" or "off"'
            ) from None
        except OSError as error:
            raise ConfigError(f"{run_dir / 'wandb'}: cannot be written: {error.strerror or error}") from None
        except ValueError as error:  # of its settings, which it takes from the environment, too
            raise ConfigError(
                f"Weights & Biases does not take a setting, maybe a variable WANDB_… of the environment: {_line(error)}"
            ) from None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._run is None or kind not in (*SECTIONS, FINDING):
            return
        try:
            if kind == FINDING:
                self._alert(values)
                return
            if step < self._newest or step + self._shift < self._row:
                self._shift = self._row + 1 - step
            self._newest, self._row = step, step + self._shift
            self._run.log({STEP: step, **_flat_names(SECTIONS[kind], values)}, step=self._row)
        except self._errors as error:
            self.problem = f"Weights & Biases is left out from here on: {_line(error)}"
            self._leave()

    def _alert(self, finding: dict[str, Any]) -> None:
        """Tell of a finding as W&B tells its users: in the run's page, and by mail or Slack as they have set it."""
        text = f"{finding['evidence']}\nCause: {finding['cause']}\nTo do: {finding['remedy']}"
        self._run.alert(finding["rule"], text, level=ALERT_LEVELS[finding["severity"]], wait_duration=0)

    def update(self, config: Config) -> None:
        if self._run is None:
            return
        try:
            self._run.config.update(to_dict(config), allow_val_change=True)
        except self._errors as error:
            self.problem = f"Weights & Biases: {_line(error)}"

    def finish(self, exit_code: int) -> None:
        """An exit code other than 0 marks the run as failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
            self._run = None
        except self._errors as error:
            self.problem = f"Weights & Biases: {_line(error)}"
            self._leave()

    def _leave(self) -> None:
        """Leave W&B's process, which does not answer, so that its library does not wait for it when p828 ends."""
        import wandb

        self._run = None
        with suppress(*self._errors):
            wandb.teardown()

    def _start(self, run_dir: Path, config: Config, mode: str) -> Any:
        import wandb

        # silent: nothing is printed through the progress bar, and no terminal is asked for a key
        wandb.setup(wandb.Settings(silent=True, console="off"))
        run = wandb.init(
            project=config.wandb.project,
            name=config.name,
            id=self._id,
            dir=run_dir,
            mode="online" if mode == "online" else "offline",
            resume="allow",
            config=to_dict(config),
            settings=wandb.Settings(finish_timeout=FINISH_WITHIN),
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        self.url, self._row = run.url, run.step
        return run


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _run_id(path: Path) -> str:
    """The id in the file, which is made if need be. Raises ConfigError if it holds none."""
    try:
        if not os.path.lexists(path):
            write_atomic(path, uuid.uuid4().hex[:12] + "\n")
        found = read_limited(path, LONGEST_ID).decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read or written: {error.strerror or error}") from None
    except ValueError:
        found = ""
    if not re.fullmatch(r"[\w.-]+", found):
        raise ConfigError(f"{path}: holds no id of a Weights & Biases run; remove the file to begin a new one there")
    return found


def _flat_names(section: str, values: dict[str, Any]) -> dict[str, float]:
    """`train/loss` for single numbers, `train/grad_norms/router` for those by part, and `tasks/NAME/accuracy` for those
    of tasks; of the loads and routers `load/min_share` and so on, the most telling of all layers, and `balance/layer_0`
    and so on. Texts are left out, and what has a number an expert, which is too much.
    """
    flat = {f"{section}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
    flat |= {
        f"{section}/{task}/{metric}": value
        for task, metrics in values.get("results", {}).items()
        for metric, value in metrics.items()
    }
    for key, by_part in values.items():
        if isinstance(by_part, dict):
            flat |= {f"{section}/{key}/{part}": n for part, n in by_part.items() if isinstance(n, int | float)}
    over_layers = (
        ("min_share", min), ("max_share", max), ("starved", sum), ("router_entropy", min), ("bias_max", max),
        ("bias_load_correlation", min),
    )  # fmt: skip
    flat |= {f"load/{key}": function(values[key]) for key, function in over_layers if values.get(key)}
    return flat | {f"balance/layer_{layer}": score for layer, score in enumerate(values.get("balance", ()))}
