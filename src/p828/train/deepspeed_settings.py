"""What DeepSpeed is told: from the run's configuration, or from a DeepSpeed file that must agree with it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p828.config import PRESETS, Config, DeepSpeedConfig
from p828.errors import UserError, nearest

PRESET_FILES = PRESETS / "deepspeed"
LARGEST_FILE = 2**20
AUTO = "auto"
# Of DeepSpeed's keys those that mean something here. The rest of what it knows is another trainer's.
KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16", "zero_optimization", "optimizer", "scheduler", "data_types", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
)  # fmt: skip
FOR_US = ("optimizer", "scheduler", "data_types")  # checked, and then left out of what DeepSpeed reads


@dataclass(frozen=True)
class DeepSpeedSettings:
    """`values` is a DeepSpeed configuration; `stage` and the rest stand in it too."""

    values: dict[str, Any]
    stage: int
    offload_optimizer: bool
    offload_param: bool


def deepspeed_settings(config: Config, dtype: str, world_size: int) -> DeepSpeedSettings:
    """For a run whose layers compute in `dtype`, "float32" or "bfloat16".

    Raises UserError naming file and key: for a file that cannot be read, a key given twice or unknown, and a value that
    contradicts the run's configuration.
    """
    values = _own_settings(config, dtype, world_size)
    if config.deepspeed.config:
        path = _find(config.deepspeed.config)
        given = read_strictly(path)
        _check_keys(given, path)
        expected = _expected(config, dtype, world_size)
        given = _filled(given, {**expected, **_flat(values)}, path)
        _check_agreement(given, expected, config.deepspeed, path)
        values = _merged(values, {key: value for key, value in given.items() if key not in FOR_US})
    zero = values["zero_optimization"]
    offloads = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    _check_offload(offloads, zero["stage"], config.deepspeed.config)
    if zero["stage"] >= 2 and dtype == "bfloat16":
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return DeepSpeedSettings(values, zero["stage"], *(device == "cpu" for device in offloads.values()))


def read_strictly(path: Path) -> dict[str, Any]:
    """A JSON object, as RFC 8259 has it. Raises UserError; a key that is given twice is named."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f'{path}: "{key}" is given twice, as {_shown(found[key])} and as {_shown(value)}')
            found[key] = value
        return found

    def not_a_number(text: str) -> None:
        raise ValueError(f"{text} is no JSON number")

    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UserError(f"{path}: more than {LARGEST_FILE:,} bytes")
        values = json.loads(content, object_pairs_hook=without_duplicates, parse_constant=not_a_number)
    except FileNotFoundError:
        names = sorted(file.stem for file in PRESET_FILES.glob("*.json"))
        raise UserError(f"no file {path}; give a .json file or one of {', '.join(names)}") from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {_shown(values)}; an object with DeepSpeed's keys is accepted")
    return values


def _find(name_or_path: str) -> Path:
    preset = PRESET_FILES / f"{name_or_path}.json"
    return preset if preset.exists() else Path(name_or_path)


def _own_settings(config: Config, dtype: str, world_size: int) -> dict[str, Any]:
    own, train = config.deepspeed, config.train
    zero: dict[str, Any] = {
        "stage": own.stage,
        "overlap_comm": own.overlap_comm,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": own.reduce_bucket_size,
        "allgather_bucket_size": own.allgather_bucket_size,
        "memory_efficient_linear": False,  # would replace torch.nn.functional.linear in the whole process
    }
    if own.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if own.offload_param == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": train.micro_batch_size * train.gradient_accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
    }


def _expected(config: Config, dtype: str, world_size: int) -> dict[str, tuple[Any, str]]:
    """Dotted key of a DeepSpeed file to the value it must have and the key of ours that says so."""
    train, optimizer = config.train, config.optimizer
    batch = train.micro_batch_size * train.gradient_accumulation * world_size
    return {
        "train_batch_size": (batch, f"train.micro_batch_size x train.gradient_accumulation x {world_size} ranks"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (train.gradient_accumulation, "train.gradient_accumulation"),
        "gradient_clipping": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "bf16.enabled": (dtype == "bfloat16", f'train.dtype, here "{dtype}",'),
        "fp16.enabled": (False, f'train.dtype, here "{dtype}",'),
        "optimizer.params.lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": (list(optimizer.betas), "optimizer.betas"),
        "optimizer.params.eps": (optimizer.eps, "optimizer.eps"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
        "optimizer.type": ("AdamW", "p828, which has no other,"),
        "data_types.grad_accum_dtype": ("fp32", "p828, which sums gradients in float32,"),
    }


def _check_keys(given: Mapping[str, Any], path: Path) -> None:
    for key, value in given.items():
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key}{nearest(key, KEYS)} Accepted: {', '.join(KEYS)}")
        if key in ("bf16", "fp16", "zero_optimization", "optimizer", "data_types") and not isinstance(value, dict):
            raise UserError(f"{path}: {key} = {_shown(value)}: an object is accepted")
    if given.get("scheduler") is not None:
        raise UserError(f"{path}: scheduler: the learning rate follows [schedule] of the run; leave this key out")


def _filled(given: Mapping[str, Any], known: Mapping[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    """`given` with every "auto" replaced by what the run's configuration says."""
    filled: dict[str, Any] = {}
    for key, value in given.items():
        dotted = prefix + key
        if isinstance(value, dict):
            filled[key] = _filled(value, known, path, f"{dotted}.")
        elif value == AUTO:
            if dotted not in known:
                raise UserError(f'{path}: {dotted} = "auto": the run says nothing of it; give a value or leave it out')
            found = known[dotted]
            filled[key] = found[0] if isinstance(found, tuple) else found
        else:
            filled[key] = value
    return filled


def _check_agreement(
    given: Mapping[str, Any], expected: Mapping[str, tuple[Any, str]], own: DeepSpeedConfig, path: Path
) -> None:
    """Raises UserError with the first value that contradicts the run's configuration."""
    for key, value in _flat(given).items():
        if key in expected and value != expected[key][0] and not _same_number(value, expected[key][0]):
            wanted, source = expected[key]
            raise UserError(
                f"{path}: {key} = {_shown(value)} contradicts {source} = {_shown(wanted)}".replace(", =", ":")
            )
        name = key.removeprefix("zero_optimization.")
        if key != name and hasattr(own, name) and getattr(own, name) not in (getattr(DeepSpeedConfig(), name), value):
            raise UserError(
                f"{path}: {key} = {_shown(value)} contradicts deepspeed.{name} = {_shown(getattr(own, name))}; "
                "give it in one place"
            )


def _check_offload(devices: Mapping[str, Any], stage: Any, path: str) -> None:
    where = f"{path}: zero_optimization." if path else "deepspeed."
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{where}stage = {_shown(stage)}: 0, 1, 2 or 3 is accepted")
    for key, device in devices.items():
        if device not in ("none", "cpu"):
            raise UserError(f'{where}{key}.device = {_shown(device)}: "none" or "cpu" is accepted')
        least = 1 if key == "offload_optimizer" else 3
        if device == "cpu" and stage < least:
            raise UserError(f"{where}{key}: accepted from stage {least} on; the stage is {stage}")


def _same_number(first: Any, second: Any) -> bool:
    numbers = (int, float)
    is_bool = isinstance(first, bool) or isinstance(second, bool)
    return not is_bool and isinstance(first, numbers) and isinstance(second, numbers) and float(first) == float(second)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value."""

    def walk() -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from _flat(value, f"{prefix}{key}.").items()
            else:
                yield prefix + key, value

    return dict(walk())


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
