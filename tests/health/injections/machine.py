"""Faults 20 to 24: state that is half written, a full disk, hangs, memory, and where a step's time goes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import STRIKES_AT, Fault, Settings, Strength
from injections.patching import after_update, before_update, replaced
from torch import nn

import p828.data.loader
from p828.data.batch import Batch
from p828.engine.plain import PlainEngine
from p828.model.init import initialise
from p828.train.checkpoint_writer import CheckpointWriter


@contextmanager
def half_written(form: Strength) -> Iterator[None]:
    """The newest checkpoint lacks a part of a file, or a file; or the process is killed while it writes one."""

    def make(original: Callable[..., Path]) -> Callable[..., Path]:
        def publish(writer: CheckpointWriter) -> Path:
            if form == "killed" and writer.step > STRIKES_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            path = original(writer)
            file = path / "model.safetensors"
            if form == "file cut" and writer.step > STRIKES_AT:
                os.truncate(file, file.stat().st_size // 2)
            if form == "file gone" and writer.step > STRIKES_AT:
                file.unlink()
            return path

        return publish

    with replaced(CheckpointWriter, "publish", make):
        yield


@contextmanager
def half_loaded(strength: Strength) -> Iterator[None]:
    """A resume loads the optimizer's state, and weights that were drawn anew."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def load(engine: PlainEngine, *arguments: Any) -> None:
            original(engine, *arguments)
            initialise(engine.model, seed=99)

        return load

    with replaced(PlainEngine, "load_state_dict", make):
        yield


@contextmanager
def hanging(form: Strength) -> Iterator[None]:
    """From a step on nothing goes on: the step itself, the data, or the whole process, which is stopped."""
    forever = threading.Event()

    def strike(engine: PlainEngine, step: int) -> None:
        if step == STRIKES_AT:
            if form == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                forever.wait()

    def make(original: Callable[..., Batch]) -> Callable[..., Batch]:
        made = 0

        def make_batch(*arguments: Any) -> Batch:
            nonlocal made
            made += 1
            if made == 2 * STRIKES_AT:
                forever.wait()
            return original(*arguments)

        return make_batch

    with replaced(p828.data.loader, "make_batch", make) if form == "data" else before_update(strike):
        yield


@contextmanager
def leak(megabytes: Strength) -> Iterator[None]:
    """Every step keeps a tensor."""
    kept: list[torch.Tensor] = []

    def keep(engine: PlainEngine, step: int) -> None:
        kept.append(torch.ones(int(float(megabytes) * 2**18)))

    with after_update(keep):
        yield


@contextmanager
def slow_data(milliseconds: Strength) -> Iterator[None]:
    def make(original: Callable[..., Batch]) -> Callable[..., Batch]:
        def make_batch(*arguments: Any) -> Batch:
            time.sleep(float(milliseconds) / 1000)
            return original(*arguments)

        return make_batch

    with replaced(p828.data.loader, "make_batch", make):
        yield


@contextmanager
def compiled_quickly(strength: Strength = "") -> Iterator[None]:
    """Graphs are made as ever, without a compiler's minutes.

    They go through AOTAutograd as a real run's do. Run as Dynamo finds them (`eager`), each call of an autograd
    function leaves a class and its tensors in a reference cycle, which is memory that grows until Python collects it.
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        return lambda layer: original(layer, backend="aot_eager")

    with replaced(nn.Module, "compile", make):
        yield


@contextmanager
def changing_constant(every: Strength) -> Iterator[None]:
    """A Python number that the compiled layers read is another one every so many steps."""

    def change(engine: PlainEngine, step: int) -> None:
        for layer in engine.model.layers:
            layer.input_layernorm.eps = 1e-5 * (1 + 1e-6 * (step // int(every)))

    with compiled_quickly(), before_update(change):
        yield


def _one_in_ten(form: Strength, corpus: Path) -> Settings:
    return {"checkpoint": {"every": 10, "keep_last": 100}}


def _short(form: Strength, corpus: Path) -> Settings:
    """A run that mostly waits."""
    return {"train": {"steps": 100}}


def _compiled(every: Strength, corpus: Path) -> Settings:
    return {"train": {"compile": "on"}}


FAULTS = (
    Fault(
        20, "half-written checkpoint", ("half_written_state",), half_written, ("file cut", "file gone", "killed"),
        strikes_at=STRIKES_AT,
    ),
    Fault(
        20, "resume with other weights", ("half_written_state",), half_loaded, is_resumed=True, strikes_at=STRIKES_AT
    ),
    Fault(
        21, "small disk, in MB", ("disk_filling",), strengths=(30.0, 50.0), settings=_one_in_ten, has_own_disk=True
    ),
    Fault(22, "hang", ("hang",), hanging, ("step", "data", "stopped"), strikes_at=STRIKES_AT, hangs=True),
    Fault(23, "memory kept, in MB a step", ("memory_growth",), leak, (1.0, 3.0)),
    Fault(24, "slow data, in ms a micro-batch", ("data_starved",), slow_data, (150.0, 300.0), settings=_short),
    Fault(24, "recompiled after steps", ("recompiling",), changing_constant, (1, 8), settings=_compiled),
)  # fmt: skip
