"""What a run reports of itself: each record goes to `metrics.jsonl`, to the console and to trackers, as W&B."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from p828.config import DataConfig, ModelConfig, TrainConfig
from p828.engine.interface import StepResult
from p828.health.finding import Finding
from p828.inference.evaluate import Evaluation, perplexity
from p828.inference.tasks.tasks import Results, shown_metrics
from p828.model.costs import training_flops
from p828.runs.file_system import free_bytes
from p828.runs.records import Recorder, loads_every, loads_record, measured_every, shortened
from p828.runs.train_state import BatchStats, TrainState
from p828.system.device import compiled_graphs, compiles, peak_memory
from p828.system.gpus import peak_flops
from p828.train.log.console import Console
from p828.train.log.usage import A_DAY, Pace, Usage, how_long

DISK_EVERY = 10.0  # seconds: asking a shared file system takes longer than a short step should


class Log:
    """Builds a run's records and fans them out. Only rank 0's shows and writes anything.

    `recorder` appends to `metrics.jsonl` and passes each record on to its mirror, the trackers.
    """

    def __init__(
        self,
        recorder: Recorder,
        console: Console,
        usage: Usage,
        model: ModelConfig,
        data: DataConfig,
        train: TrainConfig,
        device: torch.device,
        num_ranks: int = 1,
    ) -> None:
        self.recorder, self.console, self.usage = recorder, console, usage
        self.model, self.data, self.train = model, data, train
        self.device, self.num_ranks = device, num_ranks
        self._compiles = compiles(train, device)
        self._is_first_step, self._pace = True, Pace()  # of this start
        self._compiled_before, self._disk_due = 0, 0.0

    def step(
        self,
        state: TrainState,
        result: StepResult,
        stats: BatchStats,
        learning_rate: float,
        seconds: float,
        is_evaluated: bool,
    ) -> None:
        """Record a step that took `seconds`, from waiting for its batches to its numbers.

        A number of the result that is not known here passes through to the record and to the trackers as it is.
        """
        step, tokens_per_second = state.step, stats.tokens / seconds
        is_whole = step == 1 or is_evaluated or self._is_turn_of_loads(step)
        self.recorder.write(
            "step",
            step,
            tokens=state.tokens,
            epoch=stats.epoch,
            **self._data_record(state, stats),
            rows=f"{stats.hash:08x}",
            **_engine_record(result, is_whole or self.is_measured(step)),
            perplexity=perplexity(result.loss),
            lr=learning_rate,
            tokens_per_second=tokens_per_second,
            mfu=self._mfu(stats, seconds),
            memory_bytes=max(self.usage.memory_bytes, peak_memory(self.device)),
            seconds=seconds,
            data_seconds=shortened(stats.wait_seconds),
            **self._machine_record(result.device_seconds, seconds),
            **loads_record(result.loads, is_whole),
        )
        self._report_mirror(step)
        self.console.step(step, loss=result.loss, tokens_per_second=tokens_per_second)
        self._report_pace(step)
        if not result.applied:
            text = f"step {step} was not applied: loss {result.loss}, gradient norm {result.grad_norm}"
            self.event("non_finite", step, text)

    def is_measured(self, step: int) -> bool:
        """Whether this step's line has the numbers by part and of the routers."""
        return step == 1 or step % measured_every(self.model.num_hidden_layers, self.model.n_routed_experts) == 0

    @contextmanager
    def running_step(self, step: int) -> Iterator[None]:
        """Around a step's forward and backward passes and update: says that the first one is at work if it is long."""
        self._compiled_before = compiled_graphs()
        if not self._is_first_step:
            yield
            return
        text = f"step {step} is at work" + (", which compiles the layers first" if self._compiles else "")
        if not self._compiles:
            self._pace.seconds_per_step(step - 1)  # the first step is like the others
        with self.console.waiting(text):
            yield
        self._is_first_step = False

    def micro_batch(self, step: int, number: int, of: int) -> None:
        """Show how far the step is: micro-batch `number` of `of` was handed to the device."""
        self.console.micro_batch(number, of)
        if self.device.type == "cpu" and number < of:  # a GPU is not waited for here
            self._report_pace(step - 1 + number / of)

    def evaluation(self, state: TrainState, result: Evaluation, is_best: bool) -> None:
        """Record a validation loss, and show it with what each source of a mixture has given so far."""
        self.recorder.write("eval", state.step, **dataclasses.asdict(result), best=is_best)
        self.console.evaluation(state.step, loss=result.loss, perplexity=result.perplexity, best=is_best)
        if self.data.mixture:
            self.console.sources(self.data.source_names, state.source_tokens)

    def probe(self, step: int, numbers: dict[str, float]) -> None:
        """Record what the probes found."""
        self.recorder.write("probe", step, **numbers)

    def tasks(self, step: int, results: Results) -> None:
        """Record what the model is worth at tasks, and show a line of each."""
        self.recorder.write("tasks", step, results=results)
        for name, metrics in results.items():
            self.console.print(f"step {step}: {name}: {shown_metrics(metrics)}")

    def data_sources(self, step: int, sources: Sequence[dict[str, Any]]) -> None:
        """Record at a start how much data each source has, and the epochs that the run makes of it."""
        self.recorder.write("data", step, sources=list(sources))

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Record (prompt, continuation) pairs, and show each in a line."""
        if samples:
            self.recorder.write("sample", step, samples=[list(sample) for sample in samples])
            self.console.preview(samples)

    def event(self, event: str, step: int, text: str = "", **values: Any) -> None:
        """Record something that happened, and show its text if it has one."""
        self.recorder.write("event", step, event=event, **({"text": text} if text else {}), **values)
        if text:
            self.console.event(text)

    def finding(self, finding: Finding) -> None:
        """Record and show what a rule of run health found."""
        values = finding.to_json()
        self.recorder.write("finding", values.pop("step"), **values)
        entries = [("", finding.evidence), ("cause", finding.cause), ("to do", finding.remedy)]
        self.console.block(finding.title(), entries, is_event=finding.severity != "note")

    def rewind(self, step: int) -> None:
        """Drop the records of the steps after `step`, which come again."""
        if damage := self.recorder.rewind(step):
            self.event("damaged_records", step, damage)

    def _mfu(self, stats: BatchStats, seconds: float) -> float | None:
        """Model FLOPs utilisation; None for a device whose peak is not known."""
        flops, peak = training_flops(self.model, stats.tokens, stats.attended_pairs), peak_flops(self.device)
        return None if peak is None else flops / (seconds * peak * self.num_ranks)

    def _machine_record(self, device_seconds: float | None, seconds: float) -> dict[str, Any]:
        """What is said of the machine where there is something to say, of a step of so many seconds.

        The seconds in which its GPU was not at work, graphs compiled, the ranks' memory, the disk's free bytes.
        """
        record: dict[str, Any] = {}
        if device_seconds is not None:
            record["host_seconds"] = shortened(max(seconds - device_seconds, 0.0))
        if compiled := compiled_graphs() - self._compiled_before:
            record["compilations"] = compiled
        if self.num_ranks > 1:
            record["rank_memory_bytes"] = self.usage.rank_memory_bytes
        if time.monotonic() >= self._disk_due:
            record["disk_free_bytes"] = free_bytes(self.recorder.path.parent)
            self._disk_due = time.monotonic() + DISK_EVERY
        return record

    def _data_record(self, state: TrainState, stats: BatchStats) -> dict[str, Any]:
        """What the run was trained on so far: documents, those of them that were split, tokens by source.

        And the step's targets, with conversations fewer than its tokens, its largest token id, and the share of its
        rows that are in it already.
        """
        record: dict[str, Any] = {"documents": state.documents, "cut_documents": state.cut_documents}
        record |= {"targets": stats.targets, "max_token": stats.max_token}
        if stats.repeated_rows:
            record["repeated_rows"] = stats.repeated_rows / stats.rows
        if self.data.bad_records == "skip":
            record["bad_records"] = stats.bad_records
        if self.data.mixture:
            record["source_tokens"] = dict(zip(self.data.source_names, state.source_tokens, strict=True))
        return record

    def _is_turn_of_loads(self, step: int) -> bool:
        return step % loads_every(self.model.num_hidden_layers, self.model.n_routed_experts) == 0

    def _report_mirror(self, step: int) -> None:
        """Report once that a tracker failed; the run goes on without it."""
        if self.recorder.mirror is not None:
            for tracker, text in self.recorder.mirror.problems():
                self.event(tracker, step, text)

    def _report_pace(self, steps: float) -> None:
        """Report once how long the run takes at the rate of its first steps; `steps` are done, the last one in part."""
        seconds = self._pace.seconds_per_step(steps)
        if seconds is None or steps >= self.train.steps:
            return
        left = seconds * (self.train.steps - steps)
        text = how_long(left, self.usage.is_resumed, self.device.type, self.num_ranks)
        if self.train.hours and self.usage.seconds() + left > self.train.hours * 3600:
            text += f"; it ends after train.hours = {self.train.hours:g}"
        self.console.event(text) if left > A_DAY else self.console.print(text)


def _engine_record(result: StepResult, is_long: bool) -> dict[str, Any]:
    """What the engine found; of the gradients' norms by part only in a line that `is_long`."""
    numbers = result.numbers()
    if not is_long:
        numbers.pop("grad_norms", None)
    return {name: shortened(found) if isinstance(found, list | dict) else found for name, found in numbers.items()}
