"""What a run says of itself before it starts."""

from collections.abc import Sequence

from p828.config import Config, DataConfig
from p828.data.amount import Amount, describe, short
from p828.distributed.group import ProcessGroup
from p828.engine.deepspeed.settings import DeepSpeedSettings
from p828.engine.interface import Engine
from p828.model.costs import count_parameters
from p828.train.wandb import WandbMirror


def entries(
    config: Config,
    engine: Engine,
    ranks: ProcessGroup,
    settings: DeepSpeedSettings | None,
    amounts: Sequence[Amount],
    wandb: WandbMirror | None,
) -> list[tuple[str, str]]:
    """Key and value of every line."""
    parameters = count_parameters(config.model)
    device = str(engine.device) if ranks.size == 1 else f"{ranks.size} x {engine.device.type}"
    if settings is not None:
        device += f" through DeepSpeed, ZeRO stage {settings.stage},"
    sources = [
        ("data", (f"{amount.name}: " if config.data.mixture else "") + _source(data, amount))
        for data, amount in zip(config.data.sources, amounts, strict=True)
    ]
    lines = [
        ("model", f"{parameters.total / 1e6:.1f} M parameters, {parameters.active / 1e6:.1f} M active"),
        ("device", f"{device} in {str(engine.dtype).removeprefix('torch.')}"),
        *sources,
        ("steps", _steps(config, ranks, amounts)),
        ("schedule", _schedule(config)),
        ("directory", str(config.run_dir)),
    ]
    if wandb is not None:
        lines.append(("W&B", wandb.url or f"offline, in {config.run_dir}/wandb"))
    return lines


def _source(data: DataConfig, amount: Amount) -> str:
    if data.prepared:
        name = data.prepared
    elif data.source == "files":
        name = " ".join(data.files[:3]) + (f" and {len(data.files) - 3:,} more" if len(data.files) > 3 else "")
    elif data.source == "hf":
        name = " ".join(filter(None, (data.hub_name, data.hub_subset, data.hub_split)))
    else:
        name = "the standard library's source"
    epochs = "" if amount.epochs is None else f", {_count(amount.epochs)} epochs in this run"
    return f"{name}: {describe(amount)}{epochs}"


def _steps(config: Config, ranks: ProcessGroup, amounts: Sequence[Amount]) -> str:
    a_step = config.tokens_per_step * ranks.size
    text = f"{config.train.steps:,} of {a_step:,} tokens, {short(config.train.steps * a_step)} in all"
    return text + (f"; at most {config.train.hours:g} hours" if config.train.hours else "")


def _schedule(config: Config) -> str:
    schedule, peak = config.schedule, config.optimizer.learning_rate
    rise = f"{schedule.warmup_steps:,} steps up to {peak:.3g}" if schedule.warmup_steps else f"from {peak:.3g}"
    lowest = peak * schedule.min_lr_ratio
    ends = {
        "cosine": f", then down to {lowest:.3g} at the last",
        "constant": ", which stays",
        "wsd": f", which stays but for the last {schedule.decay_steps:,}, down to {lowest:.3g}",
    }
    return f"{schedule.kind}: {rise}{ends[schedule.kind]}"


def _count(epochs: float) -> str:
    return f"{epochs:.1f}" if epochs >= 0.1 else f"{epochs:.2g}"
