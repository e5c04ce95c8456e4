"""Tasks of lm-eval, or of a directory in its format, with p828's own model and tokenizer under them."""

import contextlib
import difflib
import io
import os
import random
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from p828.data.text.hub import check_reachable
from p828.errors import ConfigError, P828Error, RunFailed, did_you_mean
from p828.inference.tasks.own_names import OWN_NAMES
from p828.inference.tasks.task_model import TaskModel

INSTALL = "pip install 'p828[evaluate]'"
BOOTSTRAP_ITERATIONS = 1000  # for standard errors of the few metrics that have no formula
FROM_HUB = "Tasks' data come from the Hugging Face hub, or with HF_HUB_OFFLINE=1 from its cache"
LONGEST_CAUSE = 300  # characters
NEAR_NAMES = 5
NEAR_TO_OWN = 0.8  # by difflib; the nearest names of lm-eval, toksuite_english and code2text_python, are at 0.7
TASK_NAME = re.compile(r"[\w.()-]+", re.ASCII)  # of lm-eval's


class TasksFailed(RunFailed):
    """lm-eval, or a task's own code, that fails at work."""


@dataclass(frozen=True)
class LmEvalTasks:
    """Tasks whose data are read."""

    loaded: dict[str, Any]
    """As lm-eval's `TaskManager.load` gives them: `tasks`, `groups` and `group_map`, by name."""
    is_quiet: bool
    """Whether lm-eval's bars and warnings are left out; else they go to standard error."""

    def measure(self, model: TaskModel, limit: int | None, num_fewshot: int | None) -> dict[str, dict[str, float]]:
        """Each task's metrics, and their standard errors as `METRIC_stderr`; of groups also those over their tasks.

        The first `limit` documents of each task are used, and `num_fewshot` examples unless the task's file says 0.
        Python's, NumPy's and PyTorch's random states stay as they are. Raises TasksFailed.
        """
        from lm_eval.evaluator import evaluate

        with _set_apart(self.is_quiet), _answered("lm-eval fails", TasksFailed):
            self._set_examples(model, num_fewshot)
            found = evaluate(
                as_lm(model), self.loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=False
            )
            assert found is not None
        shots, counts = found.get("n-shot", {}), found.get("n-samples", {})
        results = {**found.get("groups", {}), **found["results"]}
        return {name: _numbers(values, shots.get(name), counts.get(name)) for name, values in results.items()}

    def _set_examples(self, model: TaskModel, num_fewshot: int | None) -> None:
        """As lm-eval's own command does, with its seeds."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        for name, task in self.loaded["tasks"].items():
            own = task.get_config("num_fewshot")
            if num_fewshot and own == 0:
                model.report(f"{name} is measured without examples: its file says num_fewshot: 0")
            elif num_fewshot is not None:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def open_tasks(names: Sequence[str], directory: str = "", is_quiet: bool = False) -> LmEvalTasks:
    """Find the tasks, groups and tags of these names, first in a directory of task files, and read their data.

    Raises ConfigError without lm-eval, for a name that is unknown, for tasks that execute what a model writes or need
    more than text, and where a task's data cannot be read, as without a network.
    """
    if find_spec("lm_eval") is None:
        own = f"p828's own tasks are {', '.join(OWN_NAMES)}{did_you_mean(names[0], OWN_NAMES)}"
        raise ConfigError(f"tasks: {names[0]!r}: {own} lm-eval, which has others, is not installed: {INSTALL}")
    if directory and not Path(directory).is_dir():
        raise ConfigError(f"tasks_path = {directory!r}: no such directory")
    if not directory:
        _check_names(names)
    with _set_apart(is_quiet), _answered(f"tasks {', '.join(names)}: cannot be read"):
        manager = _manager(names, directory)
        for name in names:
            if name not in manager.task_index:
                raise ConfigError(unknown_task(name, [*OWN_NAMES, *manager.all_tasks], directory))
        _check_hub(manager, names)
        found = manager.load(list(names))
        _check_supported(found["tasks"])
    return LmEvalTasks(found, is_quiet)


def _check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for names that lm-eval does not have, before its index is built, which takes many seconds."""
    for name in names:
        is_near_own = difflib.get_close_matches(name, OWN_NAMES, n=1, cutoff=NEAR_TO_OWN)
        if is_near_own or not TASK_NAME.fullmatch(name):
            raise ConfigError(unknown_task(name, OWN_NAMES, directory=""))


def _manager(names: Sequence[str], directory: str) -> Any:
    """A `TaskManager`, without lm-eval's own tasks, whose index takes seconds, if the directory has all of these."""
    from lm_eval.tasks import TaskManager

    if directory:
        own = TaskManager(include_path=directory, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=directory or None)


def unknown_task(name: str, known: Sequence[str], directory: str) -> str:
    """A line about a name that is none of those known."""
    near = difflib.get_close_matches(name, known, n=NEAR_NAMES)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
    place = f", and none in {directory}{_unreadable(directory)}" if directory else ""
    return f"tasks: no task {name!r} in lm-eval{place}; {hint}"


def _unreadable(directory: str) -> str:
    """The first file of a directory that lm-eval passes over, in brackets."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(directory).rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of a parser, of what a file includes, or of reading it
            return f" ({path} is no task file: {' '.join(str(error).split())[:LONGEST_CAUSE]})"
    return ""


def _check_hub(manager: Any, names: Sequence[str]) -> None:
    """Raises ConfigError in seconds where the hub is needed and cannot be reached, which else takes half a minute."""
    for name in _hub_names(manager, names):
        try:
            check_reachable(name, "dataset")
        except ConfigError as error:
            cause = str(error).partition("\n")[0]
            raise ConfigError(f"tasks {', '.join(names)}: {cause}\n{FROM_HUB}") from error
        return  # one tells of all


def _hub_names(manager: Any, names: Iterable[Any]) -> Iterator[str]:
    """The data sets on the hub that tasks, and those of groups and tags, name in their files."""
    for name in names:
        entry = manager.task_index.get(name) if isinstance(name, str) else None
        values = name if isinstance(name, dict) else (entry and entry.cfg) or {}
        path = values.get("dataset_path") or ""
        if "/" in path and not Path(path).exists():
            yield path
        inner = values.get("task", ())
        if not isinstance(inner, str):
            yield from _hub_names(manager, inner)
        if entry is not None and entry.cfg is None:  # a tag
            yield from _hub_names(manager, sorted(entry.tags))


def _check_supported(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"tasks: {name} executes what the model writes, which p828 does not")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"tasks: {name} has images or sound; the model reads text")


def as_lm(model: TaskModel) -> Any:
    """The model as an `LM`, what lm-eval asks for."""
    from lm_eval.api.model import LM

    class P828(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [
                (score.nats, score.is_greedy) for score in model.loglikelihoods([request.args for request in requests])
            ]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return model.document_loglikelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Requests of the same settings are continued together."""
            by_settings: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                by_settings.setdefault(repr(request.args[1]), []).append(index)
            texts = [""] * len(requests)
            for indices in by_settings.values():
                prompts, settings = [requests[index].args[0] for index in indices], requests[indices[0]].args[1]
                for index, text in zip(indices, model.continuations(prompts, settings), strict=True):
                    texts[index] = text
            return texts

    return P828()


def _numbers(values: dict[str, Any], shots: int | None, counts: dict[str, int] | None) -> dict[str, float]:
    """lm-eval's `acc,none` as `acc`, and `acc_stderr,none` as `acc_stderr`; other filters stay in the name."""
    found = {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if counts is not None:
        found["items"] = counts["effective"]
    return found if shots is None else {**found, "num_fewshot": shots}


class _OfOtherThreads(io.TextIOBase):
    """A stream that takes what other threads write, and drops what the one that made it does."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._owner = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if self._stream is not None and threading.get_ident() != self._owner:
            self._stream.write(text)
        return len(text)


@contextlib.contextmanager
def _set_apart(is_quiet: bool) -> Iterator[None]:
    """Random states and the environment are as before after the block, and standard output gets nothing of it.

    For some standard errors lm-eval would start processes, which a process with threads and a GPU must not. What it
    prints goes to standard error, or nowhere if `is_quiet`.
    """
    states = random.getstate(), np.random.get_state()
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    apart: contextlib.AbstractContextManager[Any] = contextlib.redirect_stdout(sys.stderr)
    if is_quiet:
        apart = contextlib.redirect_stderr(_OfOtherThreads(sys.stderr))
    try:
        with torch.random.fork_rng(devices=[]), apart:
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        os.environ.pop("DISABLE_MULTIPROC") if before is None else os.environ.update(DISABLE_MULTIPROC=before)


@contextlib.contextmanager
def _answered(what: str, kind: type[P828Error] = ConfigError) -> Iterator[None]:
    """Raise `kind` for an error of lm-eval, of a task's own code or of its data, which may be of any class."""
    try:
        yield
    except P828Error:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_CAUSE]
        is_of_hub = isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)
        advice = f"\n{FROM_HUB}" if is_of_hub else ""
        raise kind(f"{what}: {text}{advice}") from error
