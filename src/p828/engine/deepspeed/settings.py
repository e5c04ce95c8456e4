"""DeepSpeed's settings: from the run's configuration, or from a DeepSpeed file that must agree with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p828.config import Config
from p828.config.files import PRESETS, merged
from p828.config.strict_json import shown, strict_json
from p828.config.values import flatten
from p828.errors import ConfigError, did_you_mean, reason
from p828.files import MEBIBYTE, read_limited

LARGEST_FILE = MEBIBYTE
MOST_PROBLEMS = 10  # in one message
NOT_PASSED_ON = ("optimizer", "scheduler", "data_types", "fp16")  # checked, and kept from DeepSpeed
LEAST_STAGE = {"offload_optimizer": 1, "offload_param": 3}

FROM_0, FROM_1 = range(2**63), range(1, 2**63)
AS_RUN = object  # only the run's own value is accepted
_STAGE_3_SIZES = (
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
)  # fmt: skip
_SWITCHES = (
    "overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions", "use_multi_rank_bucket_allreduce",
    "load_from_fp32_weights", "ignore_unused_parameters", "log_trace_cache_warnings", "enable_sanity_checks",
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
)  # fmt: skip
_OFFLOAD = {"device": ("none", "cpu"), "pin_memory": bool, "buffer_count": FROM_0}
# DeepSpeed's keys that are accepted, each with its values: a type, a range of whole numbers, or a choice. Its other
# keys belong to other trainers, or would change what the engine relies on.
KEYS: dict[str, Any] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), AS_RUN),
    **dict.fromkeys(("gradient_clipping", "scheduler"), AS_RUN),
    "bf16": {"enabled": AS_RUN, "check_grad_overflow": (True,)},
    "fp16": {
        "enabled": AS_RUN, "loss_scale": float, "min_loss_scale": float,
        **dict.fromkeys(("initial_scale_power", "loss_scale_window", "hysteresis"), FROM_0),
    },
    "optimizer": {"type": ("AdamW",), "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), AS_RUN)},
    "data_types": {"grad_accum_dtype": ("fp32",)},
    "communication_data_type": ("fp32", "bf16"),
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1,),
    "zero_optimization": {
        "stage": (0, 1, 2, 3), "reduce_bucket_size": FROM_1, "allgather_bucket_size": FROM_0, "sub_group_size": FROM_0,
        **dict.fromkeys(_STAGE_3_SIZES, FROM_0), **dict.fromkeys(_SWITCHES, bool),
        "offload_optimizer": {**_OFFLOAD, "fast_init": bool},
        "offload_param": {**_OFFLOAD, "buffer_size": FROM_0, "max_in_cpu": FROM_0},
        "round_robin_gradients": (False,), "zero_hpz_partition_size": (1,), "memory_efficient_linear": (False,),
    },
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), bool),
    "steps_per_print": FROM_1,
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), bool),
    "comms_logger": {"prof_ops": list, **dict.fromkeys(("enabled", "verbose", "prof_all", "debug"), bool)},
    "flops_profiler": {"enabled": (False,)},  # metrics.jsonl has a step's FLOPs, and `p828 bench` a profile of it
}  # fmt: skip
# From a dotted key of DeepSpeed to the key of p828 with the same meaning.
OURS = {
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer.params.lr": "optimizer.learning_rate",
    **{f"optimizer.params.{key}": f"optimizer.{key}" for key in ("betas", "eps", "weight_decay")},
}
OURS_IN_ZERO = ("stage", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size")  # keys of [deepspeed] here


@dataclass(frozen=True)
class DeepSpeedSettings:
    """`values` is a DeepSpeed configuration. The other fields are read out of it."""

    values: dict[str, Any]
    stage: int
    offload_optimizer: bool
    offload_param: bool


def deepspeed_settings(config: Config, dtype: str, world_size: int) -> DeepSpeedSettings:
    """DeepSpeed's settings for a run whose layers compute in `dtype`, "float32" or "bfloat16".

    Raises ConfigError naming file and key: for a file that cannot be read, a key that is unknown or given twice, and a
    value that is not accepted or contradicts the run's configuration.
    """
    values, name = _own_settings(config, dtype, world_size), config.deepspeed.config
    if name:
        path = preset_files().get(name, Path(name))
        problems: list[str] = []
        given = _checked(read_strictly(path), KEYS, _of_run(config, dtype, world_size), problems)
        if problems:
            raise ConfigError(_listed([f"{path}: {problem}" for problem in problems]))
        values = merged(values, {key: value for key, value in given.items() if key not in NOT_PASSED_ON})
    zero = values["zero_optimization"]
    offloads = {key: zero.get(key, {}).get("device") == "cpu" for key in LEAST_STAGE}
    for key, least in LEAST_STAGE.items():
        if offloads[key] and zero["stage"] < least:
            where = f"{name}: zero_optimization.{key}.device" if name else f"deepspeed.{key}"
            raise ConfigError(f'{where} = "cpu": accepted from stage {least} on; the stage is {zero["stage"]}')
    if zero["stage"] < 2 and not offloads["offload_optimizer"] and values.get("communication_data_type") == "bf16":
        raise ConfigError(f'{name}: communication_data_type = "bf16": below stage 2 gradients are reduced in float32')
    if zero["stage"] >= 2 and dtype == "bfloat16":
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return DeepSpeedSettings(values, zero["stage"], **offloads)


def preset_files() -> dict[str, Path]:
    """The DeepSpeed files that come with p828, by name."""
    files = sorted((PRESETS / "deepspeed").glob("*.json"), key=lambda file: file.stem)
    return {file.stem: file for file in files}


def read_strictly(path: Path) -> dict[str, Any]:
    """The JSON object in a file, strictly by RFC 8259. Raises ConfigError, also for a key that is given twice."""
    try:
        # "-sig": some editors write a byte order mark first, which RFC 8259 allows readers to ignore.
        text = read_limited(path, LARGEST_FILE).decode("utf-8-sig")
        values = strict_json(text)
    except FileNotFoundError:
        near = did_you_mean(str(path), preset_files())
        raise ConfigError(f"no file {path}{near} Accepted: a .json file, {', '.join(preset_files())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as JSON: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {reason(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {shown(values)}; an object with DeepSpeed's keys is accepted")
    return values


def _own_settings(config: Config, dtype: str, world_size: int) -> dict[str, Any]:
    own, train = config.deepspeed, config.train
    zero: dict[str, Any] = {
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "use_multi_rank_bucket_allreduce": False,  # a rank's share goes to that rank, not to all
        "memory_efficient_linear": False,  # would replace torch.nn.functional.linear in the whole process
    }
    zero |= {key: getattr(own, key) for key in OURS_IN_ZERO}
    for key in LEAST_STAGE:
        if getattr(own, key) == "cpu":
            zero[key] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": train.micro_batch_size * train.gradient_accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
    }


def _of_run(config: Config, dtype: str, world_size: int) -> dict[str, tuple[Any, str]]:
    """From a dotted key of a DeepSpeed file to the run's value, and to the reason why the file may have no other.

    The reason names the run's own key and value; it is empty where the file's value wins.
    """
    flat, unset, found = flatten(config), flatten(Config()), dict[str, tuple[Any, str]]()
    for key, ours in OURS.items():
        value = list(flat[ours]) if isinstance(flat[ours], tuple) else flat[ours]
        found[key] = value, f"{ours} = {shown(value)}"
    for key in (*OURS_IN_ZERO, *LEAST_STAGE):
        # A default may not have been given at all, so the file's value wins over it.
        ours = f"deepspeed.{key}"
        because = f"{ours} = {shown(flat[ours])}" if flat[ours] != unset[ours] else ""
        found[f"zero_optimization.{key}{'.device' if key in LEAST_STAGE else ''}"] = flat[ours], because
    sizes = (config.train.micro_batch_size, config.train.gradient_accumulation, world_size)
    product = f"{' x '.join(map(str, sizes))} = {math.prod(sizes)}"
    of_dtype = f"train.dtype = {shown(config.train.dtype)}, here {shown(dtype)}"
    return found | {
        "train_batch_size": (
            math.prod(sizes),
            f"train.micro_batch_size x train.gradient_accumulation x ranks = {product}",
        ),
        "bf16.enabled": (dtype == "bfloat16", of_dtype),
        "fp16.enabled": (False, of_dtype),
        "scheduler": (None, f"schedule.kind = {shown(config.schedule.kind)}"),
        # DeepSpeed's own defaults, for "auto".
        "zero_optimization.stage3_prefetch_bucket_size": (50_000_000, ""),
        "zero_optimization.stage3_param_persistence_threshold": (100_000, ""),
    }


def _checked(
    given: Mapping[str, Any],
    keys: Mapping[str, Any],
    of_run: Mapping[str, tuple[Any, str]],
    problems: list[str],
    section: str = "",
) -> dict[str, Any]:
    """`given` with every "auto" replaced by the run's value.

    A key or value that is not accepted is left out, and a line about it is added to `problems`. `section` is the dotted
    name of `given` with a dot behind it.
    """
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in keys:
            near = did_you_mean(key, keys)
            problems.append(f"unknown key {shown(section + key)}{near} Accepted: {', '.join(keys)}")
            continue
        name, kind = section + key, keys[key]
        if isinstance(kind, dict):
            value = {"device": "none"} if value is None and key in LEAST_STAGE else value
            if isinstance(value, dict):
                checked[key] = _checked(value, kind, of_run, problems, f"{name}.")
            else:
                problems.append(f"{name} = {shown(value)}: an object is accepted")
            continue
        own, because = of_run.get(name, (None, ""))
        if problem := _problem(name, value, kind, of_run):
            problems.append(f"{name} = {shown(value)}{problem}")
        elif value == "auto" or because:
            checked[key] = own
        else:
            checked[key] = int(value) if isinstance(kind, range) else value
    return checked


def _problem(name: str, value: Any, kind: Any, of_run: Mapping[str, tuple[Any, str]]) -> str:
    """What is wrong with a key's value; empty where it is accepted."""
    own, because = of_run.get(name, (None, ""))
    if value == "auto":
        return "" if name in of_run else ": the run says nothing of it; give a value or leave the key out"
    if because:
        return "" if _same(value, own) else f' contradicts {because}: {shown(own)} or "auto" is accepted'
    return "" if _fits(value, kind) else f": {_words(kind)} is accepted"


def _listed(problems: list[str]) -> str:
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return "\n".join(problems[:MOST_PROBLEMS] + more)


def _fits(value: Any, kind: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(kind, tuple):
        return any(_same(value, one) for one in kind)
    if isinstance(kind, range):
        return is_number and kind.start <= value < kind.stop and value == int(value)  # 5e8 is a float
    return is_number if kind is float else isinstance(value, kind)


def _words(kind: Any) -> str:
    if isinstance(kind, range):
        return f"a whole number from {kind.start}"
    if isinstance(kind, tuple):
        return " or ".join(map(shown, kind))
    return {bool: "true or false", float: "a number", list: "a list"}[kind]


def _same(first: Any, second: Any) -> bool:
    """Equality in which 1 is 1.0 but not true."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second and isinstance(first, bool) == isinstance(second, bool)
