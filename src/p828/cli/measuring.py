"""What `p828 evaluate` does once its flags are read: load the model, measure it, and show what is found."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p828.errors import RunFailed, warn
from p828.files import write_atomic
from p828.inference.context_extension import (
    extended_config,
    losses_by_position,
    position_table,
    trained_context,
    with_rope_scaling,
)
from p828.inference.evaluate import evaluate
from p828.inference.load import LoadedModel, load_model
from p828.inference.measured_text import batches_of, in_words, measured_config
from p828.inference.tasks.task_model import TaskModel
from p828.inference.tasks.tasks import Tasks, open_all, shown_metrics
from p828.runs.records import encoded
from p828.system.device import explain_out_of_memory
from p828.train.log.console import waiting
from p828.train.signals import interruptible

NO_BYTES = "not known: the tokens of the prepared data are decoded to other text; --data.files measures text itself"


def measure(checkpoint: str, device: str, names: Sequence[str], flags: dict[str, Any], file: str) -> None:
    """`names` are those of tasks, and `flags` what was given; results go to `file`, too, unless it is empty."""
    tasks = None
    if names:
        with waiting("finding the tasks, and reading their data", warn):
            tasks = interruptible(lambda: open_all(names, flags.get("tasks_path", "")))
    with waiting("loading the model", warn):
        loaded = load_model(checkpoint, device)
    if tasks is not None:
        results, lines = _at_tasks(loaded, tasks, flags)
    else:
        results, lines = _by_position(loaded, flags) if "context" in flags else _on_text(loaded, flags)
    print("\n".join([f"checkpoint     {loaded.path} (step {loaded.step})", *lines]), flush=True)
    if file:
        _write(Path(file), {"checkpoint": str(loaded.path), "step": loaded.step, **results})


def _on_text(loaded: LoadedModel, flags: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Names and numbers, and the lines that show them."""
    config = measured_config(loaded, flags)
    with waiting("measuring", warn):
        result = interruptible(lambda: evaluate(loaded.model, batches_of(config, loaded, flags, warn), loaded.dtype))
    lines = [
        f"loss           {result.loss:.5f} nats per token",
        f"perplexity     {result.perplexity:.5g}",
        f"bits per byte  {NO_BYTES if result.bits_per_byte is None else format(result.bits_per_byte, '.5f')}",
        f"on             {result.tokens:,} tokens" + ("" if result.bytes is None else f", {result.bytes:,} bytes"),
    ]
    lines.append(f"text           {in_words(config, flags)}")
    return dataclasses.asdict(result), lines


def _by_position(loaded: LoadedModel, flags: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    context, trained = flags["context"], trained_context(loaded)
    config = extended_config(measured_config(loaded, flags), loaded, context, flags.get("model.rope_scaling.factor"))
    scaling = config.model.rope_scaling
    names = ["without YaRN", *([f"YaRN, factor {scaling.factor:g}"] if scaling.factor > 1 else [])]
    scalings = [dataclasses.replace(scaling, factor=1.0), scaling][: len(names)]
    models = [with_rope_scaling(loaded.model, scaling) for scaling in scalings]
    with waiting("measuring", warn):
        batches = batches_of(config, loaded, flags, warn)
        with explain_out_of_memory(f"--context {context}", "Lower --micro-batch-size or --context"):
            ranges = interruptible(lambda: losses_by_position(models, batches, context, loaded.dtype))
    lines = [f"trained on     {trained:,} tokens of context", f"text           {in_words(config, flags)}", ""]
    lines += position_table(names, ranges)
    if not any(one.tokens for one in ranges if one.last >= trained) and context > trained:
        lines += ["", "no position past the trained context has a target: give longer documents, as --data.files FILE"]
    found = [
        {**dataclasses.asdict(one), "losses": dict(zip(names, one.losses, strict=True))}
        | {"perplexities": dict(zip(names, one.perplexities, strict=True))}
        for one in ranges
    ]
    return {"trained_context": trained, "rope_scaling": dataclasses.asdict(scaling), "positions": found}, lines


def _at_tasks(loaded: LoadedModel, tasks: Tasks, flags: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    model = TaskModel.of(loaded, flags.get("micro_batch_size", 0), warn)
    with waiting("measuring", warn):
        results = interruptible(lambda: tasks.measure(model, flags.get("limit"), flags.get("num_fewshot")))
    width = max(len(name) for name in ["checkpoint   ", *results]) + 2
    return {"tasks": results}, [f"{name:<{width}}{shown_metrics(metrics)}" for name, metrics in results.items()]


def _write(path: Path, values: dict[str, Any]) -> None:
    try:
        write_atomic(path, json.dumps(encoded(values), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise RunFailed(f"--json {path}: cannot be written: {error.strerror or error}") from None
