"""DeepSpeed's configuration: from the run's own keys, and from files that must agree with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p828 import config
from p828.config import Config
from p828.config import files as config_files
from p828.engine.deepspeed.settings import KEYS, LARGEST_FILE, deepspeed_settings, read_strictly
from p828.errors import ConfigError

PRESETS = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero3-offload": (3, True)}
RUN = config.load("60m")
BATCHES = "train.micro_batch_size x train.gradient_accumulation x ranks = 8 x 16 x 2 = 256"
ADAMW = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}


def run(**own: Any) -> Config:
    """The 60m preset with its [deepspeed] changed."""
    return dataclasses.replace(RUN, deepspeed=dataclasses.replace(RUN.deepspeed, **own))


def through_deepspeed(**own: Any) -> Config:
    return dataclasses.replace(run(**own), engine="deepspeed")


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def settings_of(path: Path, values: dict[str, Any], dtype: str = "bfloat16", **own: Any) -> dict[str, Any]:
    """What becomes of a file with these values, on two ranks."""
    path.write_text(json.dumps(values))
    return deepspeed_settings(run(config=str(path), **own), dtype, 2).values


def complaint(path: Path, values: dict[str, Any], dtype: str = "bfloat16", **own: Any) -> str:
    """What is said about a file with these values, checked to be a line that names the file."""
    with pytest.raises(ConfigError) as error:
        settings_of(path, values, dtype, **own)
    return line_about(path, error)


def line_about(path: Path, error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    assert str(path) in message
    return message.replace(str(path), path.name)


@pytest.fixture
def ds(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


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


def test_a_file_of_its_own_beside_a_presets_name(tmp_path: Path) -> None:
    """A path is never completed to a preset's or another file's name."""
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ConfigError, match="no file"):
        deepspeed_settings(run(config=str(tmp_path / "mine")), "float32", 1)


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


def test_a_byte_order_mark_is_ignored(ds: Path) -> None:
    ds.write_bytes(b"\xef\xbb\xbf{}")
    assert read_strictly(ds) == {}


UNREADABLE: dict[str, tuple[str | bytes, list[str]]] = {
    "duplicate": ('{"bf16": {}, "bf16": {"enabled": 1}}', ['"bf16" is given twice, as {} and as {"enabled": 1}']),
    "nested duplicate": (
        '{"zero_optimization": {"stage": 1, "overlap_comm": true, "stage": 2}}',
        ['"stage" is given twice, as 1 and as 2'],
    ),
    "duplicate in a list": ('{"x": [{"a\\n\\n\\n": 1, "a\\n\\n\\n": 1}]}', [r'"a\n\n\n" is given twice']),
    "spelled in two ways": (r'{"stage": 1, "st\u0061ge": 1}', ['"stage" is given twice']),
    "not JSON": ("{stage: 1}", ["JSON", "line 1"]),
    "a comment": ('{"steps_per_print": 1 // often\n}', ["JSON", "line 1"]),
    "empty": ("", ["JSON"]),
    "two values": ("{} {}", ["JSON", "Extra data"]),
    "NaN": ('{"gradient_clipping": NaN}', ["JSON", "NaN"]),
    "Infinity": ('{"gradient_clipping": -Infinity}', ["JSON", "-Infinity"]),
    "too large a number": ('{"gradient_clipping": 1e999}', ["JSON", "1e999"]),
    "a list": ('[{"stage": 1}]', ['holds [{"stage": 1}]', "an object"]),
    "null": ("null", ["holds null", "an object"]),
    "brackets": ("[" * 10_000 + "]" * 10_000, ["ds.json"]),
    "brackets in a value": ('{"steps_per_print": ' + "[" * 10_000 + "]" * 10_000 + "}", ["ds.json"]),
    "half as deep as can be read": ('{"steps_per_print": ' + "[" * 500 + "]" * 500 + "}", ["steps_per_print = [[["]),
    "objects as deep": ('{"bf16": ' + '{"bf16":' * 400 + "1" + "}" * 401, ["unknown key", "bf16.bf16"]),
    "a number of 5000 digits": ('{"steps_per_print": ' + "1" * 5000 + "}", ["ds.json"]),
    "not UTF-8": (b'{"steps_per_print": "\xff"}', ["JSON", "utf-8"]),
    "UTF-16": ("{}".encode("utf-16"), ["JSON", "utf-8"]),
    "too large": (b" " * LARGEST_FILE + b"{}", ["more than 1,048,576 bytes"]),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_cannot_be_read(case: str, ds: Path) -> None:
    content, says = UNREADABLE[case]
    ds.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        deepspeed_settings(run(config=str(ds)), "bfloat16", 1)
    said = line_about(ds, error)
    assert len(said) < 400, said
    for part in says:
        assert part in said, said


def test_the_largest_file_is_read(ds: Path) -> None:
    ds.write_bytes(b" " * (LARGEST_FILE - 2) + b"{}")
    assert read_strictly(ds) == {}


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory") as error:
        read_strictly(tmp_path)
    line_about(tmp_path, error)


@pytest.mark.parametrize("name", ["zero3-ofload", "zero3_offload"])
def test_no_file_but_a_near_preset(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no file {name}; did you mean zero3-offload\? Accepted: .*zero1, zero2"):
        deepspeed_settings(run(config=name), "float32", 1)


@pytest.mark.parametrize("name", ["gone.json", "x" * 300, "a\0b", "zero1.json"])
def test_no_such_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(ConfigError) as error:
        deepspeed_settings(run(config=str(path)), "float32", 1)
    line_about(path, error)


UNKNOWN = [
    ("gradient_acumulation_steps", 16, "did you mean gradient_accumulation_steps?"),
    ("zero_optimisation", {}, "did you mean zero_optimization?"),
    ("zzz", 1, "Accepted: train_batch_size, "),
    ("bf16.enabeld", True, "did you mean enabled?"),
    ("zero_optimization.stge", 1, "did you mean stage?"),
    ("zero_optimization.offload_param.devise", "cpu", "did you mean device?"),
    ("zero_optimization.__eq__", 1, "Accepted: stage, "),
    ("zero_optimization.timeout_seconds", 5, "Accepted: stage, "),
    ("zero_optimization.cpu_offload", True, "Accepted: stage, "),
    ("optimizer.params.amsgrad", True, "Accepted: lr, betas, eps, weight_decay"),
    ("moe", {}, "Accepted: train_batch_size, "),
]


@pytest.mark.parametrize("key, value, says", UNKNOWN, ids=[key for key, _, _ in UNKNOWN])
def test_unknown_keys(key: str, value: Any, says: str, ds: Path) -> None:
    said = complaint(ds, nested(key, value))
    assert f'ds.json: unknown key "{key}"' in said
    assert says in said


def test_an_unknown_key_is_shown_in_a_line(ds: Path) -> None:
    assert r"a\nb\u2028" in complaint(ds, {"a\nb\u2028": 1})
    assert len(complaint(ds, {"x" * 100_000: 1})) < 1000


@pytest.mark.parametrize("section", [key for key, kind in KEYS.items() if isinstance(kind, dict)])
@pytest.mark.parametrize("value, shown", [(5, "5"), ([], "[]"), ("auto", '"auto"'), (True, "true"), (None, "null")])
def test_sections_are_objects(section: str, value: Any, shown: str, ds: Path) -> None:
    assert complaint(ds, {section: value}) == f"ds.json: {section} = {shown}: an object is accepted"


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


def test_true_is_not_one(ds: Path) -> None:
    single = dataclasses.replace(RUN.train, micro_batch_size=1)
    ds.write_text('{"train_micro_batch_size_per_gpu": true}')
    with pytest.raises(ConfigError, match=r"= true contradicts train\.micro_batch_size = 1"):
        deepspeed_settings(dataclasses.replace(run(config=str(ds)), train=single), "float32", 1)


# A key, a value that is not accepted whatever the run is, and what is.
WRONG_VALUES: list[tuple[str, Any, str]] = [
    *(("zero_optimization.stage", value, "0 or 1 or 2 or 3") for value in (5, -1, 1.5, "2", True, None, [], {})),
    *(
        (f"zero_optimization.{key}.device", value, '"none" or "cpu"')
        for key in ("offload_optimizer", "offload_param")
        for value in ("nvme", "CPU", None, True, {"cpu": 1})
    ),
    ("zero_optimization.offload_optimizer", "cpu", "an object"),
    ("zero_optimization.offload_param", False, "an object"),
    ("zero_optimization.reduce_bucket_size", 0, "a whole number from 1"),
    ("zero_optimization.reduce_bucket_size", "5e8", "a whole number from 1"),
    ("zero_optimization.reduce_bucket_size", 1.5, "a whole number from 1"),
    ("zero_optimization.reduce_bucket_size", 1e30, "a whole number from 1"),
    ("zero_optimization.allgather_bucket_size", -1, "a whole number from 0"),
    ("zero_optimization.sub_group_size", True, "a whole number from 0"),
    ("zero_optimization.overlap_comm", 1, "true or false"),
    ("zero_optimization.overlap_comm", "false", "true or false"),
    ("zero_optimization.round_robin_gradients", True, "false"),
    ("zero_optimization.zero_hpz_partition_size", 2, "1"),
    ("zero_optimization.memory_efficient_linear", True, "false"),
    ("bf16.check_grad_overflow", False, "true"),
    ("fp16.loss_scale", "0", "a number"),
    ("optimizer.type", "Adam", '"AdamW"'),
    ("data_types.grad_accum_dtype", "bf16", '"fp32"'),
    ("communication_data_type", "fp16", '"fp32" or "bf16"'),
    ("prescale_gradients", True, "false"),
    ("gradient_predivide_factor", 2.0, "1"),
    ("steps_per_print", 0, "a whole number from 1"),
    ("dump_state", "yes", "true or false"),
    ("comms_logger.prof_ops", "all", "a list"),
    ("flops_profiler.enabled", True, "false"),
]


@pytest.mark.parametrize(
    "key, value, accepted", WRONG_VALUES, ids=[f"{key}-{i}" for i, (key, _, _) in enumerate(WRONG_VALUES)]
)
def test_values_of_the_wrong_kind(key: str, value: Any, accepted: str, ds: Path) -> None:
    assert complaint(ds, nested(key, value)) == f"ds.json: {key} = {json.dumps(value)}: {accepted} is accepted"


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


def names(kinds: dict[str, Any]) -> set[str]:
    return set(kinds).union(*(names(kind) for kind in kinds.values() if isinstance(kind, dict)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "cpu", "fp32"]) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(names(KEYS))) | st.text(), inner, max_size=4)
    ),
)


@pytest.fixture(scope="module")
def any_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any") / "ds.json"


@given(VALUES | st.dictionaries(st.sampled_from(sorted(KEYS)), VALUES, min_size=1, max_size=3))
@example({"\ud800": 1})
@example({"zero_optimization": {"offload_param": []}})
def test_any_content_gives_settings_or_complaints(any_file: Path, content: Any) -> None:
    any_file.write_text(json.dumps(content))
    said, stage, batch = "", 0, 256
    try:
        found = deepspeed_settings(run(config=str(any_file)), "bfloat16", 2)
        stage, batch = found.stage, found.values["train_batch_size"]
    except ConfigError as error:
        said = str(error)
    assert len(said.splitlines()) <= 11
    assert (stage in (0, 1, 2, 3), batch) == (True, 256)
