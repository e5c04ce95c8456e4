"""DeepSpeed's configuration: from the run's own keys, and from files that must agree with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_cases import ADAMW, BATCHES, complaint, nested, run, settings_of, through_deepspeed

from p828 import config
from p828.config import files as config_files
from p828.engine.deepspeed.settings import deepspeed_settings
from p828.errors import ConfigError

PRESETS = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero3-offload": (3, True)}


def test_the_runs_own_settings() -> None:
    own = {"stage": 2, "offload_optimizer": "cpu", "reduce_bucket_size": 7, "overlap_comm": False}
    found = deepspeed_settings(run(**own), "bfloat16", 2)
    assert (found.stage, found.offload_optimizer, found.offload_param) == (2, True, False)
    zero = found.values.pop("zero_optimization")
    assert found.values == {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 16,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (2, False, 7)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in zero


def test_in_float32_gradients_need_no_other_dtype() -> None:
    values = deepspeed_settings(run(stage=2), "float32", 1).values
    assert values["bf16"] == {"enabled": False}
    assert "data_types" not in values


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_presets_agree_with_a_run_and_are_filled(preset: str, dtype: str) -> None:
    stage, offloads = PRESETS[preset]
    found = deepspeed_settings(run(config=preset), dtype, 4)
    assert (found.stage, found.offload_optimizer, found.offload_param) == (stage, offloads, offloads)
    assert "auto" not in json.dumps(found.values)
    own = deepspeed_settings(run(stage=stage), dtype, 4).values
    zero, own_zero = found.values.pop("zero_optimization"), own.pop("zero_optimization")
    assert found.values == own
    assert own_zero.items() <= zero.items()


def test_there_are_no_other_presets() -> None:
    directory = config_files.PRESETS / "deepspeed"
    assert sorted(file.stem for file in directory.iterdir()) == sorted(PRESETS)


def test_a_file_goes_over_the_runs_keys(ds: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 5e6, "sub_group_size": 10, "offload_param": {"device": "cpu"}}
    values = settings_of(ds, {"zero_optimization": zero, "steps_per_print": 5, "communication_data_type": "fp32"})
    assert (values["steps_per_print"], values["communication_data_type"]) == (5, "fp32")
    found = values["zero_optimization"]
    assert (found["stage"], found["sub_group_size"], found["offload_param"]) == (3, 10, {"device": "cpu"})
    assert (found["reduce_bucket_size"], found["overlap_comm"]) == (5_000_000, True)
    assert isinstance(found["reduce_bucket_size"], int)


def test_an_empty_object_changes_nothing(ds: Path) -> None:
    assert settings_of(ds, {}) == deepspeed_settings(run(), "bfloat16", 2).values


def test_what_is_only_checked_does_not_reach_deepspeed(ds: Path) -> None:
    values = {
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "scheduler": None,
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    assert settings_of(ds, values) == deepspeed_settings(run(), "bfloat16", 2).values


# A key, a value that contradicts the run, the run's side of it, and the value that would not.
CONTRADICTIONS: list[tuple[str, Any, str, Any]] = [
    ("train_batch_size", 128, BATCHES, 256),
    ("train_batch_size", {"a": 1}, BATCHES, 256),
    ("train_micro_batch_size_per_gpu", 4, "train.micro_batch_size = 8", 8),
    ("train_micro_batch_size_per_gpu", "8", "train.micro_batch_size = 8", 8),
    ("gradient_accumulation_steps", 1, "train.gradient_accumulation = 16", 16),
    ("gradient_accumulation_steps", 10**400, "train.gradient_accumulation = 16", 16),
    ("gradient_accumulation_steps", None, "train.gradient_accumulation = 16", 16),
    ("gradient_clipping", 0.5, "optimizer.max_grad_norm = 1.0", 1.0),
    ("gradient_clipping", True, "optimizer.max_grad_norm = 1.0", 1.0),
    ("gradient_clipping", {}, "optimizer.max_grad_norm = 1.0", 1.0),
    ("bf16.enabled", False, 'train.dtype = "auto", here "bfloat16"', True),
    ("bf16.enabled", 1, 'train.dtype = "auto", here "bfloat16"', True),
    ("fp16.enabled", True, 'train.dtype = "auto", here "bfloat16"', False),
    ("fp16.enabled", 0, 'train.dtype = "auto", here "bfloat16"', False),
    ("optimizer.params.lr", 1e-3, "optimizer.learning_rate = 0.0003", 3e-4),
    ("optimizer.params.betas", [0.9, 0.999], "optimizer.betas = [0.9, 0.95]", [0.9, 0.95]),
    ("optimizer.params.betas", [0.9, 0.95, 1], "optimizer.betas = [0.9, 0.95]", [0.9, 0.95]),
    ("optimizer.params.betas", [0.9, "auto"], "optimizer.betas = [0.9, 0.95]", [0.9, 0.95]),
    ("optimizer.params.betas", 0.9, "optimizer.betas = [0.9, 0.95]", [0.9, 0.95]),
    ("optimizer.params.eps", 1e-6, "optimizer.eps = 1e-08", 1e-8),
    ("optimizer.params.weight_decay", 0, "optimizer.weight_decay = 0.01", 0.01),
    ("scheduler", {"type": "WarmupLR"}, 'schedule.kind = "cosine"', None),
    ("scheduler", {}, 'schedule.kind = "cosine"', None),
]


@pytest.mark.parametrize(
    "key, value, source, right", CONTRADICTIONS, ids=[f"{c[0]}-{i}" for i, c in enumerate(CONTRADICTIONS)]
)
def test_contradictions_name_both_sides(key: str, value: Any, source: str, right: Any, ds: Path) -> None:
    said = complaint(ds, nested(key, value))
    shown = said.removeprefix(f"ds.json: {key} = ").split(" contradicts ")[0]
    assert shown == json.dumps(value) or (len(shown) == 60 and json.dumps(value).startswith(shown[:-1]))
    assert said.endswith(f' contradicts {source}: {json.dumps(right)} or "auto" is accepted')
    settings_of(ds, nested(key, right))


def test_everything_wrong_is_told_in_a_line_each(ds: Path) -> None:
    wrong = {"gradient_clipping": 7, "bf16": {"enabled": 3}, "zero_optimization": {"stage": 9, "nothing": 1}}
    ds.write_text(json.dumps(wrong))
    with pytest.raises(ConfigError) as error:
        deepspeed_settings(run(config=str(ds)), "bfloat16", 2)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [str(ds)] * 4
    expected = ("gradient_clipping = 7", "bf16.enabled = 3", "stage = 9", '"zero_optimization.nothing"')
    assert all(says in line for line, says in zip(lines, expected, strict=True))


def test_very_much_wrong_is_counted(ds: Path) -> None:
    ds.write_text(json.dumps({f"key{number}": number for number in range(30)}))
    with pytest.raises(ConfigError, match=r"and 20 more$"):
        deepspeed_settings(run(config=str(ds)), "bfloat16", 2)


def test_precision_follows_the_dtype_in_use(ds: Path) -> None:
    assert complaint(ds, {"bf16": {"enabled": True}}, "float32") == (
        'ds.json: bf16.enabled = true contradicts train.dtype = "auto", here "float32": false or "auto" is accepted'
    )
    assert settings_of(ds, {"bf16": {"enabled": "auto"}}, "float32")["bf16"] == {"enabled": False}


def test_a_whole_number_may_be_written_as_a_fraction(ds: Path) -> None:
    values = settings_of(ds, {"train_batch_size": 256.0, "gradient_accumulation_steps": 1.6e1, "gradient_clipping": 1})
    assert [values[key] for key in ("train_batch_size", "gradient_accumulation_steps")] == [256, 16]
    assert all(isinstance(values[key], int) for key in ("train_batch_size", "gradient_accumulation_steps"))


def test_auto_everywhere_that_the_run_has_a_value(ds: Path) -> None:
    zero = dict.fromkeys(("stage", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size"), "auto")
    values = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "scheduler": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(ADAMW, "auto")},
        "zero_optimization": {
            **zero, "offload_optimizer": {"device": "auto"}, "offload_param": {"device": "auto"},
        },
    }  # fmt: skip
    own = {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 7, "offload_param": "cpu"}
    found, expected = settings_of(ds, values, **own), deepspeed_settings(run(**own), "bfloat16", 2).values
    assert found["zero_optimization"].pop("offload_optimizer") == {"device": "none"}
    assert found == expected


def test_auto_where_deepspeed_has_a_value(ds: Path) -> None:
    keys = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    found = settings_of(ds, {"zero_optimization": {"stage": 3, **dict.fromkeys(keys, "auto")}})["zero_optimization"]
    assert [found[key] for key in keys] == [50_000_000, 100_000]


@pytest.mark.parametrize("key", ["steps_per_print", "zero_optimization.sub_group_size", "optimizer.type"])
def test_auto_where_nothing_has_a_value(key: str, ds: Path) -> None:
    assert f'ds.json: {key} = "auto": the run says nothing of it' in complaint(ds, nested(key, "auto"))


@pytest.mark.parametrize("key, least", [("offload_optimizer", 1), ("offload_param", 3)])
def test_offload_needs_a_stage(key: str, least: int, ds: Path) -> None:
    zero = {"stage": least - 1, key: {"device": "cpu"}}
    assert complaint(ds, {"zero_optimization": zero}) == (
        f'ds.json: zero_optimization.{key}.device = "cpu": accepted from stage {least} on; the stage is {least - 1}'
    )
    settings_of(ds, {"zero_optimization": {**zero, "stage": least}})
    settings_of(ds, {"zero_optimization": {**zero, key: {"device": "none"}}})


def test_null_is_no_offload(ds: Path) -> None:
    zero = {"stage": 0, "offload_optimizer": None, "offload_param": None}
    ds.write_text(json.dumps({"zero_optimization": zero}))
    found = deepspeed_settings(run(config=str(ds)), "float32", 1)
    assert (found.stage, found.offload_optimizer, found.offload_param) == (0, False, False)


# [deepspeed] in the run, zero_optimization in the file, and the line.
IN_BOTH: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"stage": 2}, {"stage": 3}, "stage = 3 contradicts deepspeed.stage = 2: 2 "),
    ({"overlap_comm": False}, {"overlap_comm": True}, "overlap_comm = true contradicts deepspeed.overlap_comm = false"),
    (
        {"reduce_bucket_size": 7},
        {"reduce_bucket_size": 8},
        "reduce_bucket_size = 8 contradicts deepspeed.reduce_bucket_size = 7",
    ),
    (
        {"stage": 3, "offload_param": "cpu"},
        {"offload_param": {"device": "none"}},
        'offload_param.device = "none" contradicts deepspeed.offload_param = "cpu"',
    ),
    (
        {"offload_optimizer": "cpu"},
        {"offload_optimizer": None},
        'offload_optimizer.device = "none" contradicts deepspeed.offload_optimizer = "cpu"',
    ),
]


@pytest.mark.parametrize("own, zero, says", IN_BOTH)
def test_contradictions_between_toml_and_file(own: dict[str, Any], zero: dict[str, Any], says: str, ds: Path) -> None:
    assert f"ds.json: zero_optimization.{says}" in complaint(ds, {"zero_optimization": zero}, **own)


def test_the_same_in_toml_and_file_is_accepted(ds: Path) -> None:
    values = settings_of(
        ds, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}, stage=2, reduce_bucket_size=7
    )
    assert values["zero_optimization"]["stage"] == 2


def test_the_stage_may_come_from_the_file_and_the_offload_from_toml(ds: Path) -> None:
    own = dataclasses.replace(run(config=str(ds), offload_param="cpu"), engine="deepspeed")
    config.validate(own)
    ds.write_text('{"zero_optimization": {"stage": 3}}')
    assert deepspeed_settings(own, "float32", 1).offload_param
    ds.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigError, match="accepted from stage 3 on; the stage is 2"):
        deepspeed_settings(own, "float32", 1)


def test_a_file_for_the_plain_engine_is_refused(ds: Path) -> None:
    with pytest.raises(ConfigError, match=r'accepted with engine = "deepspeed"'):
        config.validate(run(config=str(ds)))


def test_below_stage_2_sums_are_reduced_in_float32(ds: Path) -> None:
    ds.write_text('{"communication_data_type": "bf16", "zero_optimization": {"stage": 1}}')
    with pytest.raises(ConfigError, match="below stage 2 gradients are reduced in float32"):
        deepspeed_settings(run(config=str(ds)), "bfloat16", 2)
    ds.write_text('{"communication_data_type": "bf16", "zero_optimization": {"stage": 2}}')
    assert deepspeed_settings(run(config=str(ds)), "bfloat16", 2).values["communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    "own, says",
    [
        ({"stage": 4}, ["deepspeed.stage = 4", "0, 1, 2 or 3"]),
        ({"stage": -1}, ["deepspeed.stage = -1", "from 0"]),
        ({"stage": 0, "offload_optimizer": "cpu"}, ["deepspeed.offload_optimizer", "deepspeed.stage = 0", '"none"']),
        ({"stage": 2, "offload_param": "cpu"}, ["deepspeed.offload_param", "deepspeed.stage = 2", '"none"']),
        ({"reduce_bucket_size": -5}, ["deepspeed.reduce_bucket_size = -5", "from 1"]),
        ({"allgather_bucket_size": 0}, ["deepspeed.allgather_bucket_size = 0", "from 1"]),
        ({"timeout_seconds": 0}, ["deepspeed.timeout_seconds = 0", "from 1"]),
    ],
)
def test_the_tables_own_values(own: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.validate(through_deepspeed(**own))
    assert all(part in str(error.value) for part in says), error.value


@pytest.mark.parametrize("own", [{"stage": 0}, {"stage": 1, "offload_optimizer": "cpu"}])
def test_the_least_stages_are_accepted(own: dict[str, Any]) -> None:
    config.validate(through_deepspeed(**own))
    deepspeed_settings(run(**own), "float32", 1)
