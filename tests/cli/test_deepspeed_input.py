"""A wrong DeepSpeed file is answered in one or two lines, and leaves nothing behind: no run, no process group."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from p828 import config
from p828.cli.main import dispatch
from p828.config import Config
from p828.distributed.group import ProcessGroup
from p828.engine.deepspeed.engine import check_deepspeed
from p828.engine.deepspeed.settings import AS_RUN, KEYS
from p828.errors import ConfigError
from runs import run_config, write_toml

pytest.importorskip("deepspeed")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
QUICK = ("--train.steps", "1", "--evaluation.every", "0")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is told so in the environment, which processes of later tests are not to inherit."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a tiny.toml."""
    monkeypatch.chdir(tmp_path)
    write_toml(tmp_path)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: str) -> str:
    """What `p828 train tiny.toml ARGUMENTS` through DeepSpeed says on standard error, checked for its form."""
    before, environment = sorted(directory.iterdir()), dict(os.environ)
    capsys.readouterr()
    code = dispatch(["train", "tiny.toml", "--engine", "deepspeed", *QUICK, *arguments])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("p828: ")
    assert 1 <= len(said.strip().splitlines()) <= 2, said
    assert "Traceback" not in said
    assert sorted(directory.iterdir()) == before
    assert not dist.is_initialized()
    assert {name: os.environ.get(name) for name in LAUNCHER} == {name: environment.get(name) for name in LAUNCHER}
    return said


FILES: dict[str, tuple[Any, list[str]]] = {
    "duplicate key": (b'{"gradient_clipping": 1, "gradient_clipping": 2}', ['"gradient_clipping" is given twice']),
    "not JSON": (b"stage: 3", ["JSON"]),
    "NaN": (b'{"gradient_clipping": NaN}', ["NaN"]),
    "empty": (b"", ["JSON"]),
    "brackets": (b"[" * 10_000, ["JSON"]),
    "not UTF-8": (b"\xff", ["JSON"]),
    "too large": (b" " * 2**21, ["1,048,576 bytes"]),
    "a list": ([1], ["holds [1]", "an object"]),
    "unknown key": ({"optimiser": {}}, ['"optimiser"', "did you mean optimizer?"]),
    "unknown key of ZeRO": ({"zero_optimization": {"stge": 1}}, ["zero_optimization.stge", "did you mean stage?"]),
    "stage": ({"zero_optimization": {"stage": 5}}, ["zero_optimization.stage = 5", "0 or 1 or 2 or 3 is accepted"]),
    "type in ZeRO": (
        {"zero_optimization": {"reduce_bucket_size": "large"}},
        ['zero_optimization.reduce_bucket_size = "large"', "a whole number from 1 is accepted"],
    ),
    "NVMe": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
        ['zero_optimization.offload_param.device = "nvme"', '"none" or "cpu" is accepted'],
    ),
    "offload at too low a stage": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ['zero_optimization.offload_param.device = "cpu"', "from stage 3 on; the stage is 2"],
    ),
    "section": ({"bf16": True}, ["bf16 = true", "an object is accepted"]),
    "batch": ({"train_batch_size": 8}, ["train_batch_size = 8", "2 x 2 x 1 = 4"]),
    "micro-batch": (
        {"train_micro_batch_size_per_gpu": 1},
        ["train_micro_batch_size_per_gpu = 1", "train.micro_batch_size = 2"],
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 1},
        ["gradient_accumulation_steps = 1", "train.gradient_accumulation = 2"],
    ),
    "clipping": ({"gradient_clipping": 0.1}, ["gradient_clipping = 0.1", "optimizer.max_grad_norm = 1.0"]),
    "precision": ({"bf16": {"enabled": True}}, ["bf16.enabled = true", 'train.dtype = "auto", here "float32"']),
    "fp16": ({"fp16": {"enabled": True}}, ["fp16.enabled = true", 'train.dtype = "auto"']),
    "learning rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
        ["optimizer.params.lr = 0.1", "optimizer.learning_rate = 0.01"],
    ),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, ['optimizer.type = "Lamb"', '"AdamW" is accepted']),
    "scheduler": ({"scheduler": {"type": "OneCycle"}}, ['scheduler = {"type": "OneCycle"}', "schedule.kind"]),
    "auto": ({"steps_per_print": "auto"}, ['steps_per_print = "auto"']),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files(case: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, says = FILES[case]
    path = directory / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    said = complaint(capsys, directory, "--deepspeed_config", "ds.json")
    assert said.startswith("p828: ds.json: ")
    assert all(part in said for part in says), said


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--deepspeed_config", "gone.json"), ["no file gone.json", "zero1, zero2, zero3, zero3-offload"]),
        (("--deepspeed_config", "zero-3"), ["no file zero-3", "did you mean zero3?"]),
        (("--deepspeed-config=text",), ["text", "directory"]),
        (("--deepspeed_config", "tiny.toml/ds.json"), ["tiny.toml/ds.json"]),
        (("--deepspeed_config", "zero2", "--deepspeed.stage", "3"), ["stage = 2 contradicts deepspeed.stage = 3"]),
        (("--deepspeed.stage", "4"), ["deepspeed.stage = 4", "0, 1, 2 or 3"]),
        (("--deepspeed.stage", "2", "--deepspeed.offload-param", "cpu"), ["deepspeed.offload_param", "stage = 2"]),
        (("--deepspeed.offload-optimizer", "disk"), ["--deepspeed.offload-optimizer disk", "none or cpu"]),
        (("--deepspeed.reduce-bucket-size", "-1"), ["deepspeed.reduce_bucket_size = -1", "from 1"]),
        (("--deepspeed.timeout-seconds", "0"), ["deepspeed.timeout_seconds = 0", "from 1"]),
        (("--deepspeed.stge", "1"), ["--deepspeed.stge", "did you mean --deepspeed.stage?"]),
    ],
)  # fmt: skip
def test_wrong_arguments(
    arguments: tuple[str, ...], expected: list[str], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, directory, *arguments)
    assert all(part in said for part in expected), said


def test_the_process_can_train_afterwards(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gone.json", "zero-3"):
        complaint(capsys, directory, "--deepspeed_config", name)
    assert dispatch(["train", "tiny.toml", *QUICK]) == 0
    assert (directory / "runs" / "tiny" / "checkpoints" / "step_00000001").exists()


def with_file(run: Config, path: str | Path) -> Config:
    return dataclasses.replace(run, deepspeed=dataclasses.replace(run.deepspeed, config=str(path)))


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_deepspeed_takes_the_presets(preset: str) -> None:
    assert check_deepspeed(with_file(config.load("quickstart"), preset), ProcessGroup()).stage == int(preset[4])


def accepted(kind: Any) -> st.SearchStrategy[Any]:
    """Values that are accepted for a key of this kind, whatever the run."""
    if isinstance(kind, dict):
        return st.fixed_dictionaries({}, optional={key: accepted(inner) for key, inner in kind.items()})
    if isinstance(kind, tuple):
        return st.sampled_from(kind)
    if isinstance(kind, range):
        return st.integers(kind.start, 2**40)
    return {
        bool: st.booleans(),
        float: st.floats(0, 100),
        str: st.none() | st.text(),
        list: st.lists(st.text()),
        AS_RUN: st.just("auto"),
    }[kind]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return run_config(tmp_path_factory.mktemp("tiny"))


@given(accepted(KEYS))
def test_deepspeed_takes_what_is_accepted(tiny: Config, values: dict[str, Any]) -> None:
    """Nothing is left to fail once the run has begun."""
    from deepspeed.runtime.config import DeepSpeedConfig

    path = Path(tiny.runs_dir).with_name("ds.json")
    path.write_text(json.dumps(values))
    try:
        settings = check_deepspeed(with_file(tiny, path), ProcessGroup())
    except ConfigError as error:
        if not any(text in str(error) for text in ("accepted from stage", "below stage 2")):
            raise
        return
    taken = DeepSpeedConfig(settings.values)
    assert taken.zero_optimization_stage == settings.stage
    assert (taken.train_batch_size, taken.gradient_clipping) == (4, 1.0)
