"""What Weights & Biases gets of a run's records. The run does not depend on it."""

import uuid
from pathlib import Path
from typing import Any

from p828.config import Config
from p828.config_values import to_dict
from p828.errors import UserError
from p828.files import write_atomic

SECTIONS = {"step": "train", "eval": "validation"}  # the kinds of records that it sees, and its names for them
FINISH_WITHIN = 60  # seconds to send what is left, or it stays on the disk


class WandbMirror:
    """The W&B run, begun or continued, of a run's directory, which holds its id.

    Where W&B cannot be reached the run is recorded offline; where it fails later, it is left alone. `problem` says so.
    Raises UserError when W&B refuses the key, or has none.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        import wandb

        self._run: Any = None
        self._errors = (wandb.errors.Error, OSError)
        self.problem = ""
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex[:12] + "\n")
        self._id = id_file.read_text(encoding="utf-8").strip()
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
            raise UserError(
                f'wandb.mode = "{config.wandb.mode}": Weights & Biases does not start: {_line(error)}\n'
                'run `wandb login` or set WANDB_API_KEY, or give wandb.mode "offline" or "off"'
            ) from None

    @property
    def url(self) -> str:
        """Where the run is seen; empty if it is recorded offline."""
        return (getattr(self._run, "url", None) or "") if self._run is not None else ""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._run is None or kind not in SECTIONS:
            return
        try:
            self._run.log(_flat_names(SECTIONS[kind], values), step=step)
        except self._errors as error:
            self._run = None
            self.problem = f"Weights & Biases is left out from here on: {_line(error)}"

    def finish(self, exit_code: int) -> None:
        """`exit_code` other than 0 marks the run as failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except self._errors as error:
            self.problem = f"Weights & Biases: {_line(error)}"
        self._run = None

    def _start(self, run_dir: Path, config: Config, mode: str) -> Any:
        import wandb

        # silent: nothing is printed through the progress bar, and no terminal is asked for a key
        wandb.setup(wandb.Settings(silent=True, console="off"))
        return wandb.init(
            project=config.wandb.project,
            name=config.name,
            id=self._id,
            dir=run_dir,
            mode="online" if mode == "online" else "offline",
            resume="allow",
            config=to_dict(config),
            settings=wandb.Settings(finish_timeout=FINISH_WITHIN),
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _flat_names(section: str, values: dict[str, Any]) -> dict[str, float]:
    """`train/loss` for single numbers, `load/layer_0/expert_3` and `balance/layer_0` for lists; texts are left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple):
            for layer, item in enumerate(value):
                if isinstance(item, list | tuple):
                    flat.update({f"{key}/layer_{layer}/expert_{expert}": entry for expert, entry in enumerate(item)})
                else:
                    flat[f"{key}/layer_{layer}"] = item
        else:
            flat[f"{section}/{key}"] = value
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}
