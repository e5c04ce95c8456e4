"""The tasks that were asked for, p828's own and lm-eval's, and what a model is worth at them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p828.errors import ConfigError
from p828.inference.tasks import cloze
from p828.inference.tasks.lm_eval_tasks import LmEvalTasks, open_tasks
from p828.inference.tasks.own_names import OWN_NAMES
from p828.inference.tasks.task_model import TaskModel

Results = dict[str, dict[str, float]]
"""Task to metric to number."""


@dataclass(frozen=True)
class Tasks:
    own: tuple[str, ...]
    """Names of p828's own tasks."""
    others: LmEvalTasks | None

    def measure(self, model: TaskModel, limit: int | None = None, num_fewshot: int | None = None) -> Results:
        """The metrics of each task. `limit` takes the first items of each; `num_fewshot` is for lm-eval's tasks.

        Raises NotFinite for a model that diverged, and what `LmEvalTasks.measure` raises.
        """
        found: Results = {name: dataclasses.asdict(cloze.measure(name, model, limit)) for name in self.own}
        return found if self.others is None else found | self.others.measure(model, limit, num_fewshot)


def open_all(names: Sequence[str], directory: str = "", is_quiet: bool = False) -> Tasks:
    """Find the tasks by name and read their data. `directory` has further task files in lm-eval's format.

    With `is_quiet`, lm-eval prints nothing, neither here nor in measuring. Raises ConfigError for a name that is given
    twice, and what `open_tasks` raises.
    """
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise ConfigError(f"tasks: {twice[0]} is given twice")
    others = [name for name in names if name not in OWN_NAMES]
    if directory and not others:
        raise ConfigError(f"tasks_path = {directory!r}: accepted with a task of it; p828's own tasks need none")
    return Tasks(
        tuple(name for name in names if name in OWN_NAMES),
        open_tasks(others, directory, is_quiet) if others else None,
    )


def shown_metrics(metrics: Mapping[str, float]) -> str:
    """A task's metrics in a line."""
    if "accuracy_low" in metrics:
        interval = f"{metrics['accuracy_low']:.3f} to {metrics['accuracy_high']:.3f}"
        return (
            f"accuracy {metrics['accuracy']:.3f} (95% interval {interval}; guessing {cloze.GUESSING}), "
            f"margin {metrics['margin']:+.4f} nats per byte, {_items(metrics['items'])}"
        )
    shown = []
    for name, value in metrics.items():
        metric, _, rest = name.partition(",")
        error = metrics.get(f"{metric}_stderr,{rest}" if rest else f"{metric}_stderr", math.nan)
        if name not in ("items", "num_fewshot") and not metric.endswith("_stderr"):
            shown.append(f"{name} {value:.4g}" + (f" ± {error:.2g}" if math.isfinite(error) else ""))
    if "items" in metrics:
        shown.append(_items(metrics["items"]))
    if "num_fewshot" in metrics:
        shown.append(f"{metrics['num_fewshot']}-shot")
    return ", ".join(shown)


def _items(count: float) -> str:
    return "1 item" if count == 1 else f"{count:,} items"
