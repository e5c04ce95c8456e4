"""The training loop."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from p828.config import CheckpointConfig, EvaluationConfig, TrainConfig
from p828.data.batch import Batch
from p828.distributed.group import ProcessGroup
from p828.engine.interface import Engine, StepResult
from p828.errors import ConfigError, DataError, P828Error, RecordsFailed, RunFailed
from p828.runs.train_state import BatchStats, TrainState
from p828.system.device import explain_out_of_memory
from p828.train.checkpointing import Checkpointing
from p828.train.evaluation import Evaluator
from p828.train.fetch import Fetcher
from p828.train.health import HealthWatch
from p828.train.log.log import Log
from p828.train.log.usage import Usage
from p828.train.probes import Probes
from p828.train.rollback import Rollback
from p828.train.signals import GracefulShutdown
from p828.train.task_evaluation import TaskEvaluator


@dataclass
class Trainer:
    """The loop over a run's parts. All ranks make the same calls to them."""

    train: TrainConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    schedule: Callable[[int], float]
    """The learning rate of the step that comes after n steps."""
    state: TrainState
    engine: Engine
    fetcher: Fetcher
    log: Log
    evaluator: Evaluator
    task_evaluator: TaskEvaluator | None
    """None where the run has no tasks."""
    probes: Probes
    checkpointing: Checkpointing
    rollback: Rollback
    health: HealthWatch
    usage: Usage
    ranks: ProcessGroup

    def run(self, shutdown: GracefulShutdown) -> None:
        """Train to the last step, or until patience or time runs out. A shutdown that is asked for ends it saved.

        Raises RunPaused, RunFailed and RunStopped; our own errors pass unchanged.
        """
        try:
            self.log.rewind(self.state.step)
            self.health.begin()
            self.usage.start()
            self.loop(shutdown)
            self.health.end(self.state)
        except (ConfigError, DataError, RunFailed) as error:
            self.stop_after(error)
        finally:
            self.checkpointing.close()

    def loop(self, shutdown: GracefulShutdown) -> None:
        while not self.is_done():
            started = time.perf_counter()
            batches, stats = self.fetcher.fetch(self.state, shutdown)  # may save and raise, on all ranks
            learning_rate = self.schedule(self.state.step)
            result = self.step(batches, stats, learning_rate)
            self.state.count(stats)
            self.state.update(result.loss, result.applied, self.rollback.config.spike_threshold)
            seconds, is_evaluated = time.perf_counter() - started, self.is_due(self.evaluation.every)
            self.log.step(self.state, result, stats, learning_rate, seconds, is_evaluated)
            self.probes.after_step(self.state.step, result)
            finding = self.health.after_step(self.state, batches)
            if finding is not None or self.rollback.is_due(self.state):
                self.state = self.rollback.run(self.state, finding)
                self.health.begin()
                self.checkpointing.save(self.state, is_last=self.is_done())
                continue
            is_best = is_evaluated and self.evaluate()
            if self.task_evaluator is not None and self.is_due(self.task_evaluator.every):
                self.task_evaluator.run(self.state.step)
            if is_best or self.is_due(self.checkpoint.every):
                self.checkpointing.save(self.state, is_last=self.is_done())

    def step(self, batches: list[Batch], stats: BatchStats, learning_rate: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of a step."""
        step, num_targets = self.state.step + 1, max(stats.targets, 1)  # a last row may have no target
        with explain_out_of_memory(f"step {step}"):
            self.probes.before_step(batches, stats.targets)
        with explain_out_of_memory(f"step {step}"), self.log.running_step(step):
            for number, batch in enumerate(batches, start=1):
                self.engine.forward_backward(batch, num_targets)
                self.log.micro_batch(step, number, len(batches))
            self.probes.note(batches)  # this and the next line while the device is at work
            self.health.look()
            return self.engine.step(learning_rate, self.log.is_measured(step))

    def evaluate(self) -> bool:
        """Whether the validation loss is the best so far."""
        with explain_out_of_memory(f"the evaluation of step {self.state.step}"):
            is_best = self.evaluator.run(self.state)
            self.probes.run(self.state.step)
            return is_best

    def is_done(self) -> bool:
        patience = self.evaluation.patience
        is_out_of_patience = patience > 0 and self.state.evaluations_since_best >= patience
        return self.state.step >= self.train.steps or is_out_of_patience or self.is_out_of_time()

    def is_out_of_time(self) -> bool:
        return 0 < self.train.hours * 3600 <= self.usage.trained_seconds

    def is_due(self, every: int) -> bool:
        """Whether something that is done every `every` steps, and at the end of the run, is done now."""
        return self.is_done() or (every > 0 and self.state.step % every == 0)

    def stop_after(self, error: P828Error) -> NoReturn:
        """End a run at work that cannot go on; if records fail, save first what can be saved without another rank."""
        if isinstance(error, RecordsFailed) and self.ranks.size == 1:
            with suppress(RunFailed):  # also of the record of a checkpoint that is complete
                self.checkpointing.finish(self.state)
            with suppress(RunFailed):
                self.checkpointing.save(self.state, is_last=True)
        step = self.state.step
        saved = ", which is saved; the same command goes on from there" if self.checkpointing.saved_step == step else ""
        failed = RunFailed(f"{error}\nThe run stops after step {step}{saved}")
        failed.is_everywhere = error.is_everywhere
        raise failed from error
