"""What a model in training is worth at tasks: rank 0 asks them, and all ranks compute the answers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from p828.data.tokenizer.tokenizer import Tokenizer
from p828.distributed.group import ProcessGroup
from p828.engine.interface import Engine
from p828.errors import ConfigError, NotFinite, P828Error
from p828.inference.generate import Prompt
from p828.inference.loglikelihood import Request, Score
from p828.inference.sampling_config import SamplingConfig
from p828.inference.tasks.lm_eval_tasks import TasksFailed
from p828.inference.tasks.task_model import TaskModel
from p828.inference.tasks.tasks import Results, Tasks
from p828.model.transformer import Transformer
from p828.system.device import explain_out_of_memory
from p828.train.log.console import A_WAIT, SECONDS_PER_LINE
from p828.train.log.log import Log

T = TypeVar("T")
PIECE = 2048  # texts that the ranks score between two signs of life, or prompts over the rows of a batch


@dataclass
class TaskEvaluator:
    """Measures the model at tasks and logs the results. All ranks must call it at once."""

    tasks: Tasks | None
    """None on ranks but the first, and where no task is measured."""
    every: int
    """`evaluation.tasks_every`."""
    batch_rows: int
    sequence_length: int
    tokenizer: Tokenizer
    engine: Engine
    log: Log
    ranks: ProcessGroup
    is_first: bool = True
    """Whether none was made since this start."""

    def run(self, step: int) -> None:
        """A model that diverged and a task that fails are logged as an event, and the run goes on.

        Random states, weights and the model's training mode stay as they are.
        """
        after = A_WAIT if self.is_first else SECONDS_PER_LINE
        self.is_first = False
        with (
            explain_out_of_memory(f"the tasks of step {step}"),
            self.log.console.waiting(f"step {step}: measuring at tasks", after),
        ):
            model = SharedTaskModel(
                self.engine.model,
                self.tokenizer,
                self.engine.dtype,
                self.batch_rows * self.sequence_length,
                self.batch_rows,
                lambda line: self.log.console.print(f"step {step}: {line}"),
                self.ranks,
                self.engine.model_for_any_passes,
            )
            try:
                results = model.asked_by(self.tasks)
            except (NotFinite, TasksFailed, ConfigError) as error:
                self.log.event("no_tasks", step, f"step {step}: the tasks are not measured: {error}")
                return
        self.log.tasks(step, results)


@dataclass(frozen=True)
class SharedTaskModel(TaskModel):
    """Rank 0 calls `score` and `complete`, and every rank computes its share."""

    ranks: ProcessGroup
    with_weights: Callable[[], AbstractContextManager[Transformer]]
    """`Engine.model_for_any_passes`: of `model` itself the shapes alone are used."""

    def asked_by(self, tasks: Tasks | None) -> Results:
        """Measure on rank 0, and compute what it asks for on the others. A P828Error is raised on all ranks."""
        if self.ranks.is_first:
            results, error = _tried(lambda: self._measure(tasks))
            if error is not None and error.is_everywhere:
                raise error
            self.ranks.on_rank_0(lambda: _raise(error))
            return results or {}
        while (work := self.ranks.on_rank_0(lambda: None)) is not None:
            self._share(*work)
        return {}

    def _measure(self, tasks: Tasks | None) -> Results:
        assert tasks is not None
        return tasks.measure(self)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        if self.ranks.size == 1:
            return self._share("score", requests)
        pieces = (requests[start : start + PIECE] for start in range(0, len(requests), PIECE))
        return [score for piece in pieces for score in self._asked("score", piece)]

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[str]:
        if self.ranks.size == 1:
            return self._share("complete", prompts, sampling)
        rows = self.batch_rows * self.ranks.size
        pieces = (slice(start, start + rows) for start in range(0, len(prompts), rows))
        return [text for piece in pieces for text in self._asked("complete", prompts[piece], sampling)]

    def _asked(self, method: str, *arguments: Any) -> list[Any]:
        return self._share(*self.ranks.on_rank_0(lambda: (method, *arguments)))

    def _share(self, method: str, *arguments: Any) -> list[Any]:
        """The results of all ranks, each of which computes every n-th of the sequences among the arguments."""
        rank, size = self.ranks.rank, self.ranks.size
        own = [argument[rank::size] if isinstance(argument, Sequence) else argument for argument in arguments]
        # An error ends no pass halfway: `with_weights` keeps the ranks together up to `raise_together`.
        with self.ranks.raise_together(), self.with_weights() as model:
            own_model = TaskModel(model, self.tokenizer, self.dtype, self.batch_tokens, self.batch_rows, self.report)
            share = getattr(own_model, method)(*own)
        shares = self.ranks.all_gather_object(share)
        return [shares[index % size][index // size] for index in range(len(arguments[0]))]


def _tried(function: Callable[[], T]) -> tuple[T | None, P828Error | None]:
    try:
        return function(), None
    except P828Error as error:
        return None, error


def _raise(error: P828Error | None) -> None:
    if error is not None:
        raise error
