"""DeepSpeed's configuration files: how they are read, and what is said of keys and values that are wrong in them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_cases import RUN, complaint, line_about, nested, run
from hypothesis import example, given
from hypothesis import strategies as st

from p828.engine.deepspeed.settings import KEYS, LARGEST_FILE, deepspeed_settings, read_strictly
from p828.errors import ConfigError


def test_a_file_of_its_own_beside_a_presets_name(tmp_path: Path) -> None:
    """A path is never completed to a preset's or another file's name."""
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ConfigError, match="no file"):
        deepspeed_settings(run(config=str(tmp_path / "mine")), "float32", 1)


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
