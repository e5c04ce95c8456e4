"""The flag that was meant: by its spelling, by the last part of its name, or by a name that other programs use."""

import difflib
from collections.abc import Collection

# Names that trainers use -> the flags here; of several, the first that the command has.
OTHER_NAMES = {
    "lr": ("--optimizer.learning-rate",),
    "wd": ("--optimizer.weight-decay",),
    "beta1": ("--optimizer.betas",),
    "beta2": ("--optimizer.betas",),
    "clip": ("--optimizer.max-grad-norm",),
    "grad-clip": ("--optimizer.max-grad-norm",),
    "bs": ("--train.micro-batch-size", "--micro-batch-size"),
    "batch": ("--train.micro-batch-size", "--micro-batch-size"),
    "batch-size": ("--train.micro-batch-size", "--micro-batch-size"),
    "per-device-train-batch-size": ("--train.micro-batch-size",),
    "grad-accum": ("--train.gradient-accumulation", "--gradient-accumulation"),
    "accumulation": ("--train.gradient-accumulation", "--gradient-accumulation"),
    "gradient-accumulation-steps": ("--train.gradient-accumulation", "--gradient-accumulation"),
    "epoch": ("--train.steps",),
    "epochs": ("--train.steps",),
    "num-epochs": ("--train.steps",),
    "num-train-epochs": ("--train.steps",),
    "iters": ("--train.steps", "--steps"),
    "max-iters": ("--train.steps", "--steps"),
    "max-steps": ("--train.steps", "--steps"),
    "num-steps": ("--train.steps", "--steps"),
    "total-steps": ("--train.steps",),
    "warmup": ("--schedule.warmup-steps",),
    "warmup-ratio": ("--schedule.warmup-steps",),
    "scheduler": ("--schedule.kind",),
    "lr-scheduler": ("--schedule.kind",),
    "lr-scheduler-type": ("--schedule.kind",),
    "min-lr": ("--schedule.min-lr-ratio",),
    "context": ("--data.sequence-length",),
    "context-length": ("--data.sequence-length",),
    "ctx": ("--data.sequence-length",),
    "seq-len": ("--data.sequence-length",),
    "seq-length": ("--data.sequence-length",),
    "max-seq-len": ("--data.sequence-length",),
    "max-length": ("--data.sequence-length", "--max-new-tokens"),
    "block-size": ("--data.sequence-length",),
    "layers": ("--model.num-hidden-layers",),
    "n-layer": ("--model.num-hidden-layers",),
    "n-layers": ("--model.num-hidden-layers",),
    "num-layers": ("--model.num-hidden-layers",),
    "depth": ("--model.num-hidden-layers",),
    "heads": ("--model.num-attention-heads",),
    "n-head": ("--model.num-attention-heads",),
    "n-heads": ("--model.num-attention-heads",),
    "num-heads": ("--model.num-attention-heads",),
    "hidden": ("--model.hidden-size",),
    "hidden-dim": ("--model.hidden-size",),
    "d-model": ("--model.hidden-size",),
    "dim": ("--model.hidden-size",),
    "n-embd": ("--model.hidden-size",),
    "width": ("--model.hidden-size",),
    "intermediate-size": ("--model.moe-intermediate-size",),
    "experts": ("--model.n-routed-experts",),
    "n-experts": ("--model.n-routed-experts",),
    "num-experts": ("--model.n-routed-experts",),
    "top-k": ("--top-k", "--model.num-experts-per-tok"),
    "vocab": ("--tokenizer.vocab-size",),
    "tokenizer": ("--tokenizer.name",),
    "file": ("--data.files",),
    "input": ("--data.files",),
    "data": ("--data.files",),
    "data-dir": ("--data.files",),
    "dataset": ("--data.hub-name", "--data.files"),
    "train-file": ("--data.files",),
    "train-data": ("--data.files",),
    "val-file": ("--data.validation.files",),
    "validation-file": ("--data.validation.files",),
    "val-data": ("--data.validation.files",),
    "out": ("--runs-dir",),
    "out-dir": ("--runs-dir",),
    "output": ("--runs-dir",),
    "output-dir": ("--runs-dir",),
    "save-dir": ("--runs-dir",),
    "run-name": ("--name",),
    "gpu": ("--train.device", "--device"),
    "cuda": ("--train.device", "--device"),
    "cpu": ("--train.device", "--device"),
    "bf16": ("--train.dtype",),
    "fp16": ("--train.dtype",),
    "precision": ("--train.dtype",),
    "mixed-precision": ("--train.dtype",),
    "wandb": ("--wandb.mode",),
    "report-to": ("--wandb.mode", "--trackers.tensorboard", "--trackers.trackio"),
    "tensorboard": ("--trackers.tensorboard",),
    "trackio": ("--trackers.trackio",),
    "save-every": ("--checkpoint.every",),
    "save-steps": ("--checkpoint.every",),
    "eval-every": ("--evaluation.every",),
    "eval-steps": ("--evaluation.every",),
    "eval-interval": ("--evaluation.every",),
    "zero-stage": ("--deepspeed.stage",),
    "temp": ("--temperature", "--evaluation.temperature"),
    "max-tokens": ("--max-new-tokens", "--evaluation.max-new-tokens"),
    "num-tokens": ("--max-new-tokens",),
    "length": ("--max-new-tokens", "--data.sequence-length"),
    "text": ("--prompt",),
    "penalty": ("--repetition-penalty",),
    "model": ("--shape",),
}


def suggestion(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """`; did you mean X?`, or just a full stop when no known flag is near.

    Only the spelling counts with another cutoff than the usual one.
    """
    spelt = difflib.get_close_matches(name, list(known), n=1, cutoff=max(cutoff, 0.85))
    word = name.lstrip("-")
    found = list(spelt)
    if not found:
        names = (*OTHER_NAMES.get(word, ()), *OTHER_NAMES.get(word.rpartition(".")[2], ()))
        found = [flag for flag in dict.fromkeys(names) if flag in known]
    if not found:
        found = [flag for flag in known if flag.rpartition(".")[2] == word and "." in flag]
    if not found and cutoff < 0.85:
        last_parts = {flag.lstrip("-").rpartition(".")[2]: flag for flag in known}
        found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
        near = difflib.get_close_matches(word.rpartition(".")[2], list(last_parts), n=1, cutoff=cutoff)
        found = found or [last_parts[word] for word in near]
    return f"; did you mean {' or '.join(found[:3])}?" if found else "."
