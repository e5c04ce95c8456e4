"""What a run does about anomalous steps and critical findings: it goes back to a checkpoint, or ends."""

from dataclasses import dataclass
from typing import NoReturn

from p828.config import RollbackConfig
from p828.data.loader import Loader
from p828.distributed.group import ProcessGroup
from p828.errors import RunStopped
from p828.health.finding import Finding
from p828.runs import checkpoint
from p828.runs.train_state import TrainState
from p828.train.checkpointing import Checkpointing
from p828.train.log.log import Log

NON_FINITE_LIMIT = 3  # steps in a row that end a run without rollbacks
CAUSES = "Usual causes: optimizer.learning_rate too high, too short a warm-up, broken data"


@dataclass
class Rollback:
    """Takes a run back to the newest checkpoint before its anomalous steps, and past the data of these steps."""

    config: RollbackConfig
    checkpointing: Checkpointing
    loader: Loader
    log: Log
    ranks: ProcessGroup

    def is_due(self, state: TrainState) -> bool:
        """Whether `rollback.after_steps` steps in a row were anomalous, with a spike of the loss or not finite.

        Without rollbacks (`after_steps` 0), raises RunStopped at the third step in a row that is not finite.
        """
        if self.config.after_steps:
            return state.anomalous_steps >= self.config.after_steps
        if state.non_finite_steps == NON_FINITE_LIMIT:
            what = f"{NON_FINITE_LIMIT} steps in a row up to step {state.step} had a non-finite loss or gradient"
            self.stop(state, what)
        return False

    def run(self, state: TrainState, finding: Finding | None = None) -> TrainState:
        """Put engine and data back, and return the state to go on from. Raises RunStopped at the limit of rollbacks.

        It goes back because of the finding, or else because of anomalous steps. The data goes on after the batches of
        these steps. A checkpoint is to be saved at once, so that a run which is killed now does not come by that data
        again.
        """
        self.checkpointing.finish(state)
        if finding is None:
            last_good = state.step - state.anomalous_steps
            what = (
                f"{state.anomalous_steps} steps in a row up to step {state.step} "
                "were not finite or had a loss far above the usual"
            )
            about = f"{what} (loss {state.loss:.3f}, usually {state.loss_ema:.3f})"
        else:
            last_good = finding.since - 1
            what = about = f"{finding.rule} since step {finding.since}: {finding.evidence}"
        if state.rollbacks == self.config.limit:
            self.stop(state, f"{what}, and the run was rolled back {self.config.limit} times before")
        restored = self._restore(state, last_good, what)
        back = restored.step
        self.ranks.on_rank_0(lambda: checkpoint.forget_after(self.checkpointing.directory, back))
        self.log.rewind(back)
        text = f"back to step {back}: {about}. The data of steps {back + 1} to {state.step} is left out"
        self.log.event("rollback", back, text, left_out=state.step - back)
        return restored

    def stop(self, state: TrainState, what: str, causes: str = CAUSES) -> NoReturn:
        """End the run, on all ranks, by RunStopped."""
        self.checkpointing.finish(state)
        has_saved = self.checkpointing.saved_step is not None
        kept = f"{self.checkpointing.directory} keeps what was saved" if has_saved else "no checkpoint was saved before"
        raise self.ranks.on_all_ranks(RunStopped(f"{what}; the run stops here, and {kept}.\n{causes}"))

    def _restore(self, state: TrainState, last_good: int, what: str) -> TrainState:
        self.checkpointing.wait_for_deletion()  # which changes the directory, too
        # A later checkpoint is of a run that was asked to end among the anomalous steps.
        directory, retry = self.checkpointing.directory, self.checkpointing.retry
        path, damaged = self.ranks.on_rank_0(lambda: checkpoint.find_newest(directory, last_good, retry))
        for line in damaged:
            self.log.event("damaged", state.step, line)
        if path is None:
            self.stop(state, f"{what}, and there is no checkpoint to go back to")
        with self.ranks.raise_together(), checkpoint.opened(path, retry=retry) as saved:
            restored = self.checkpointing.read_state(saved)
        self.checkpointing.load_engine(path)
        restored.rollbacks = state.rollbacks + 1
        self.checkpointing.saved_step = restored.step
        self.loader.go_on_at(restored.step)
        return restored
