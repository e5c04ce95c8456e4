"""The training loop."""

import dataclasses
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from p828.config import Config
from p828.config.values import to_dict
from p828.data.loader import DIGESTS, Batch, Loader
from p828.data.mixture import at_step, bad_records, is_stopped, merged
from p828.data.retry import Retry
from p828.data.tokenizer import Tokenizer
from p828.distributed.group import ProcessGroup
from p828.engine.plain import Engine, StepResult
from p828.errors import ConfigError, RecordsFailed, RunPaused, RunStopped, TransientReadError
from p828.inference.evaluate import perplexity
from p828.model.costs import training_flops
from p828.optim.schedule import learning_rate
from p828.runs import checkpoint
from p828.runs.checkpoint_content import check_content, config_of, reading_position, seconds_of
from p828.runs.layout import CHECKPOINTS, TOKENIZER_FILE, step_of
from p828.runs.records import Recorder, loads_every, loads_record
from p828.runs.train_state import BatchStats, TrainState
from p828.system.device import compiles, out_of_memory_told, peak_flops, peak_memory
from p828.train.changes import changed_rate, changed_rows
from p828.train.checkpointing import AsyncCheckpointer
from p828.train.console import Console
from p828.train.evaluation import Evaluations
from p828.train.pace import A_DAY, Pace, how_long
from p828.train.resume import RunDirectory
from p828.train.signals import GracefulShutdown

NON_FINITE_LIMIT = 3  # steps in a row
MICRO = 1e6  # microseconds in a second


@dataclass
class Trainer:
    """The parts of a run, and the loop over them."""

    config: Config
    directory: RunDirectory
    tokenizer: Tokenizer
    loader: Loader
    evaluations: Evaluations
    engine: Engine
    recorder: Recorder
    console: Console
    ranks: ProcessGroup = field(default_factory=ProcessGroup)
    stop: GracefulShutdown = field(default_factory=GracefulShutdown)
    progress: TrainState = field(default_factory=TrainState)
    saved_step: int | None = None
    """The newest checkpoint's."""
    memory_bytes: int = 0
    """Most that a rank has held so far."""
    trained_seconds: float = 0.0
    """Over all starts, until the current step began; the same on all ranks."""

    def __post_init__(self) -> None:
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._is_first_step, self._pace = True, Pace()  # of this start
        tokenizer = {TOKENIZER_FILE: self.tokenizer.to_json().encode()}  # so that a checkpoint can be used by itself
        self.saver = AsyncCheckpointer(self.checkpoints, self.ranks.new_group(), self.engine.device, tokenizer)

    def run(self) -> None:
        """Train to the last step, or until patience runs out."""
        try:
            self.rewind_records()
            self._started, self._seconds_before = time.monotonic(), self.trained_seconds
            self.train()
        except ConfigError as error:
            self.stop_after(error)
        finally:
            self.saver.join()
            self.saver.wait_for_deletion()

    def train(self) -> None:
        config = self.config
        while not self.is_done():
            progress = self.progress
            started = time.perf_counter()
            batches, counts = self.fetch()
            num_targets = max(counts.targets, 1)  # a last row may have none
            rate = learning_rate(progress.step, config.train.steps, config.optimizer.learning_rate, config.schedule)
            with out_of_memory_told(f"step {progress.step + 1}"):
                result = self.step(batches, num_targets, rate)

            progress.step += 1
            progress.count(counts)
            progress.update(result.loss, result.applied, config.rollback.spike_nats)
            self.record(result, rate, counts, time.perf_counter() - started)
            self.tell_pace(progress.step)
            if not self.is_kept(result):
                self.roll_back()
                continue
            with out_of_memory_told(f"the evaluation of step {progress.step}"):
                is_better = self.evaluations.make(progress) if self.is_due(config.evaluation.every) else False
            if is_better or self.is_due(config.checkpoint.every):
                self.save()

    def stop_after(self, error: ConfigError) -> NoReturn:
        """End a run at work that cannot go on; if records fail, save first what can be saved without another rank."""
        if isinstance(error, RecordsFailed) and self.ranks.size == 1:
            for save in (self.finish_save, lambda: self.save(is_last=True)):
                with suppress(ConfigError):  # also of the record of a checkpoint that is complete
                    save()
        step = self.progress.step
        saved = ", which is saved; the same command goes on from there" if self.saved_step == step else ""
        stopped = RunStopped(f"{error}\nThe run stops after step {step}{saved}")
        stopped.is_everywhere = error.is_everywhere
        raise stopped from error

    def rewind_records(self) -> None:
        """Drop the records of the steps that come again."""
        if damage := self.recorder.rewind(self.progress.step):
            self.tell("damaged_records", damage)

    def step(self, batches: list[Batch], num_targets: int, rate: float) -> StepResult:
        """What the engine makes of a step's micro-batches; tells how far it is where that takes long."""
        is_compiled = compiles(self.config.train, self.engine.device)
        first = f"step {self.progress.step + 1} is at work"
        first += ", which compiles the layers first" if is_compiled else ""
        if self._is_first_step and not is_compiled:
            self._pace.seconds_per_step(self.progress.step)  # the first one is like the others
        with self.console.waiting(first) if self._is_first_step else nullcontext():
            for number, batch in enumerate(batches, start=1):
                self.engine.forward_backward(batch, num_targets)
                self.console.micro_batch(number, len(batches))
                if self.engine.device.type == "cpu" and number < len(batches):  # a GPU is not waited for here
                    self.tell_pace(self.progress.step + number / len(batches))
            result = self.engine.step(rate)
        self._is_first_step = False
        return result

    def tell_pace(self, steps: float) -> None:
        """Tell once how long the run takes at the rate of its first steps; `steps` are done, the last one in part."""
        seconds, train = self._pace.seconds_per_step(steps), self.config.train
        if seconds is None or steps >= train.steps:
            return
        left = seconds * (train.steps - steps)
        text = how_long(left, self._seconds_before > 0, self.engine.device.type, self.ranks.size)
        if train.hours and self.seconds() + left > train.hours * 3600:
            text += f"; it ends after train.hours = {train.hours:g}"
        self.console.event(text) if left > A_DAY else self.console.print(text)

    def seconds(self) -> float:
        """Trained so far, over all starts, as this rank has it."""
        return self._seconds_before + time.monotonic() - self._started

    def fetch(self) -> tuple[list[Batch], BatchStats]:
        """This rank's micro-batches of the next step, and what those of all ranks hold.

        When a rank cannot read its own, or finds them malformed, or is asked to stop, the run is saved, and RunStopped
        or RunPaused raised on all of them.
        """
        before, batches, failure = self.loader.state_dict(), [], ""
        try:
            batches = [next(self.loader) for _ in range(self.config.train.gradient_accumulation)]
        except (TransientReadError, ConfigError) as error:
            failure = str(error)
        own = BatchStats.of(batches, len(self.config.data.source_names))
        numbers = (
            bool(failure),
            bool(self.stop.reason),
            self.saver.is_written,
            peak_memory(self.engine.device),
            self.seconds() * MICRO,
            own.epoch,
            own.attended_pairs,
            *dataclasses.astuple(own)[:4],
            *own.by_source,
        )
        of_ranks = zip(*self.ranks.all_gather(numbers), strict=True)
        failures, stops, written, memories, times, epochs, *counts = (
            [int(number) for number in numbers] for numbers in of_ranks
        )
        self.memory_bytes = max(memories)
        self.trained_seconds = max(times) / MICRO
        if all(written):
            self.finish_save()
        if any(failures) or any(stops):
            self.pause(before, failure)
        pairs, targets, documents, cut_documents, digest, *by_source = map(sum, counts)
        found = BatchStats(targets, documents, cut_documents, digest % DIGESTS, tuple(by_source), max(epochs), pairs)
        return batches, found

    def pause(self, position: dict[str, Any], failure: str) -> NoReturn:
        """End after the last step, saved: by RunPaused if a rank was asked to, else by RunStopped after a failure."""
        self.finish_save()
        # A checkpoint knows the file of the bad record again, so that the run goes on with the file mended.
        if self.saved_step != self.progress.step or any(self.ranks.all_gather_object(is_stopped(position))):
            self.save(position, is_last=True)
        failure, reason = (
            next(filter(None, self.ranks.all_gather_object(text)), "") for text in (failure, self.stop.reason)
        )
        where = f"after step {self.progress.step}, which is saved; the same command goes on from there"
        if reason:  # it may be why the data was not waited for
            raise self.ranks.on_all_ranks(RunPaused(f"stopped by {reason} {where}"))
        raise self.ranks.on_all_ranks(RunStopped(f"{failure}\nThe run stops {where}"))

    def is_done(self) -> bool:
        patience, progress = self.config.evaluation.patience, self.progress
        out_of_patience = patience > 0 and progress.evaluations_since_best >= patience
        return progress.step >= self.config.train.steps or out_of_patience or self.is_out_of_time()

    def is_out_of_time(self) -> bool:
        return 0 < self.config.train.hours * 3600 <= self.trained_seconds

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is done now."""
        return self.is_done() or (every > 0 and self.progress.step % every == 0)

    def record(self, result: StepResult, rate: float, counts: BatchStats, seconds: float) -> None:
        tokens_per_second = counts.targets / seconds
        flops = training_flops(self.config.model, counts.targets, counts.attended_pairs)
        peak = peak_flops(self.engine.device)
        self.recorder.write(
            "step",
            self.progress.step,
            tokens=self.progress.tokens,
            epoch=counts.epoch,
            **self.data_record(),
            rows=f"{counts.digest:08x}",
            loss=result.loss,
            perplexity=perplexity(result.loss),
            lr=rate,
            grad_norm=result.grad_norm,
            tokens_per_second=tokens_per_second,
            mfu=None if peak is None else flops / (seconds * peak * self.ranks.size),
            memory_bytes=max(self.memory_bytes, peak_memory(self.engine.device)),
            seconds=seconds,
            **loads_record(result.loads, self.has_whole_loads()),
        )
        if self.recorder.mirror is not None and self.recorder.mirror.problem:
            text, self.recorder.mirror.problem = self.recorder.mirror.problem, ""
            self.tell("wandb", text)
        self.console.step(self.progress.step, loss=result.loss, tokens_per_second=tokens_per_second)

    def has_whole_loads(self) -> bool:
        """Whether a step's record has every expert's load."""
        model, step = self.config.model, self.progress.step
        is_its_turn = step % loads_every(model.num_hidden_layers, model.n_routed_experts) == 0
        return step == 1 or is_its_turn or self.is_due(self.config.evaluation.every)

    def data_record(self) -> dict[str, Any]:
        """What the data was so far: documents, the cut ones among them, and tokens by source of a mixture."""
        progress = self.progress
        counts = {"documents": progress.documents, "cut_documents": progress.cut_documents}
        if self.config.data.bad_records == "skip":
            by_stream = zip(*self.ranks.all_gather(bad_records(self.loader.state_dict())), strict=True)
            counts["bad_records"] = int(sum(map(max, by_stream)))
        if not self.config.data.mixture:
            return counts
        by_name = zip(self.config.data.source_names, progress.source_tokens, strict=True)
        return {**counts, "source_tokens": dict(by_name)}

    def is_kept(self, result: StepResult) -> bool:
        """Whether to go on from a step. Tells of one that was not applied; raises RunStopped at the third in a row.

        With `rollback.after_steps` they and spikes of the loss are counted, and a run goes back after so many.
        """
        progress, after_steps = self.progress, self.config.rollback.after_steps
        if not result.applied:
            text = f"step {progress.step} was not applied: loss {result.loss}, gradient norm {result.grad_norm}"
            self.tell("non_finite", text)
        if after_steps:
            return progress.bad_steps < after_steps
        if progress.non_finite_steps == NON_FINITE_LIMIT:
            what = f"{NON_FINITE_LIMIT} steps in a row up to step {progress.step} had a non-finite loss or gradient"
            self.stop_for_good(what)
        return True

    def roll_back(self) -> None:
        """Go back to the newest checkpoint, but in the data to what comes next. Raises RunStopped at the limit."""
        self.finish_save()
        bad, config = self.progress, self.config.rollback
        what = f"{bad.bad_steps} steps in a row up to step {bad.step} were not finite or had a loss far above the usual"
        if bad.rollbacks == config.limit:
            self.stop_for_good(f"{what}, and the run was rolled back {config.limit} times before")
        self.saver.wait_for_deletion()  # which changes the directory, too
        last_good = bad.step - bad.bad_steps  # a later one is of a run that was asked to end among the bad steps
        retry = self.retry
        path, damaged = self.ranks.on_rank_0(lambda: checkpoint.find_newest(self.checkpoints, last_good, retry))
        for line in damaged:
            self.tell("damaged", line)
        if path is None:
            self.stop_for_good(f"{what}, and there is no checkpoint to go back to")
        with self.ranks.raise_together(), checkpoint.opened(path, retry=retry) as saved:
            self.progress = check_content(saved, self.config, self.loader.state_dict())
        with checkpoint.opened(path, retry=retry) as saved:
            self.engine.load_state_dict(saved.tensors)
        self.progress.rollbacks = bad.rollbacks + 1
        back = self.saved_step = self.progress.step
        self.loader.go_on_at(back)
        self.ranks.on_rank_0(lambda: checkpoint.forget_after(self.checkpoints, back))
        self.rewind_records()
        self.tell(
            "rollback",
            f"back to step {back}: {what} (loss {bad.loss:.3f}, usually {bad.usual_loss:.3f}). "
            f"The data of steps {back + 1} to {bad.step} is left out",
        )
        self.save()  # so that a run which is killed or stopped now does not come by that data again

    def stop_for_good(self, what: str) -> NoReturn:
        self.finish_save()
        kept = f"the run stops here; {self.checkpoints} keeps what was saved."
        causes = "Usual causes: optimizer.learning_rate too high, too short a warm-up, broken data"
        raise self.ranks.on_all_ranks(RunStopped(f"{what}; {kept}\n{causes}"))

    @property
    def checkpoints(self) -> Path:
        return self.directory.path / CHECKPOINTS

    def save(self, position: dict[str, Any] | None = None, is_last: bool = False) -> None:
        """Write a checkpoint. `position` is the data's if that is not the one of the batch fetched last.

        The last one is complete afterwards; others are written while the training goes on, one at a time. If that
        fails, as a later one may not, it is recorded and the run goes on. Raises ConfigError if it is the last.
        """
        self.finish_save()
        began, progress = time.monotonic(), self.progress
        is_last = is_last or self.is_done()
        if progress.bad_steps and self.config.rollback.after_steps and not is_last:
            return  # nothing to go back to
        best = progress.step if progress.best_step == progress.step else progress.saved_best_step
        state = {
            "progress": {**dataclasses.asdict(progress), "saved_best_step": best},
            "data": merged(self.ranks.all_gather_object(position or self.loader.state_dict())),
            "config": to_dict(self.config),
            "versions": self.directory.versions,
            "tokenizer": self.tokenizer.fingerprint(),
            "ranks": self.ranks.size,
            "seconds": self.seconds(),
        }
        try:
            is_done = self.saver.start(progress.step, self.engine.state_dict(), state, began)
        except ConfigError as error:
            self.not_saved(error, progress.step, is_last)
            return
        if is_done or is_last:
            self.finish_save(is_last)

    def finish_save(self, is_last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is. Raises ConfigError as `save` does."""
        step = self.saver.step
        if step is None:
            return
        try:
            with self.console.waiting("waiting for the checkpoint to be written") if is_last else nullcontext():
                saved = self.saver.finish()
        except ConfigError as error:
            self.not_saved(error, step, is_last)
            return
        self.saved_step = step
        if self.progress.best_step == step:
            self.progress.saved_best_step = step
        self.recorder.write("event", step, event="saved", **saved._asdict())
        if self.saver.problem:
            self.tell("not_deleted", self.saver.problem)
            self.saver.problem = ""
        self.saver.delete_old(self.config.checkpoint.keep_last, self.progress.saved_best_step)

    def not_saved(self, error: ConfigError, step: int, is_last: bool) -> None:
        if is_last:
            raise error
        newest = "none yet" if self.saved_step is None else f"of step {self.saved_step}"
        self.tell("not_saved", f"{error}. The run goes on; the newest checkpoint is {newest}")

    def tell(self, event: str, text: str) -> None:
        """Record something, and show it."""
        self.recorder.write("event", self.progress.step, event=event, text=text)
        self.console.event(text)

    def resume(self, path: Path) -> list[str]:
        """Go back to where a checkpoint was made.

        A line for what changes about the steps to come: their rows, or a jump of the learning rate. Raises ConfigError
        if it was made with another tokenizer, DamagedCheckpoint if its content cannot be a run's, and
        TransientReadError.
        """
        with self.ranks.raise_together(), checkpoint.opened(path, retry=self.retry) as saved:
            if saved.state.get("tokenizer") != self.tokenizer.fingerprint():
                raise ConfigError(f"{path}: trained with another tokenizer than the run's {TOKENIZER_FILE}")
            if saved.step != step_of(path):
                raise checkpoint.DamagedCheckpoint(f"{path}: its manifest says step {saved.step}")
            self.progress = check_content(saved, self.config, self.loader.state_dict())
            with reading_position(path):
                self.loader.load_state_dict(at_step(saved.state["data"], self.progress.step))
            self.saved_step = self.progress.step
            self.trained_seconds = seconds_of(saved)
        with checkpoint.opened(path, retry=self.retry) as saved:
            self.engine.load_state_dict(saved.tensors)
            before, ranks = config_of(saved), saved.state.get("ranks", 1)
        rows = changed_rows(self.config, self.ranks.size, before, ranks)
        return rows + changed_rate(self.config, self.progress.step, before)

    @property
    def retry(self) -> Retry:
        """How checkpoints that cannot be read for now are waited for."""
        return Retry(self.config.data.read_retries, tell=self.console.event)
