"""What a step found: one transfer to the host, and a new number in one place."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import p828
from p828.engine.interface import StepStats, pack, shapes_of, unpack
from p828.runs import records
from runs import start, write_toml


def test_a_fetched_step_has_every_number_by_its_name() -> None:
    tensors = {
        "loss": torch.tensor(2.5),
        "loads_LE": torch.tensor([[2**53, 1], [0, 7]]),
        "largest_L": torch.tensor([0.5, math.inf], dtype=torch.bfloat16),
        "grad_norm": torch.tensor(1 / 3, dtype=torch.float64),
        "count": torch.tensor(3),
    }
    stats = StepStats(tensors)
    tensors["loss"].zero_()  # as for the next step
    result = stats.fetch()
    assert (result.loss, result.grad_norm, result.loads) == (2.5, 1 / 3, [[2**53, 1], [0, 7]])
    assert result.applied
    assert result.numbers() == {"loss": 2.5, "grad_norm": 1 / 3, "largest_L": [0.5, math.inf], "count": 3.0}


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_step_that_is_not_finite_was_not_applied(loss: float, norm: float) -> None:
    tensors = {"loss": loss, "grad_norm": norm, "loads_LE": [[1]]}
    result = StepStats({name: torch.tensor(value) for name, value in tensors.items()}).fetch()
    assert not result.applied


def test_what_is_packed_is_unpacked() -> None:
    tensors = {"a": torch.randn(()), "b": torch.randn(2, 3), "none": torch.zeros(0), "c": torch.arange(4)}
    found = unpack(pack(tensors), shapes_of(tensors))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.double())


def edit(file: Path, line: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(line) == 1
    file.write_text(text.replace(line, new), encoding="utf-8")


@pytest.fixture
def with_more_numbers(tmp_path: Path) -> Path:
    """A copy of the package in which a step has two more numbers, each by a change of the one place for its kind."""
    source = tmp_path / "source"
    shutil.copytree(Path(p828.__file__).parent, source / "p828", ignore=shutil.ignore_patterns("__pycache__"))
    biases = "torch.stack([layer.mlp.gate.e_score_correction_bias.abs().max() for layer in model.layers])"
    edit(
        source / "p828" / "engine" / "interface.py",
        'return cls({**further, "grad_norm": grad_norm,',
        f'return cls({{**further, "grad_norm": grad_norm, "largest_bias": {biases},',
    )
    edit(
        source / "p828" / "engine" / "microbatch.py",
        '"loads_LE": router.loads_LE,',
        '"z_loss": router.z_loss_L.sum() * scale, "loads_LE": router.loads_LE,',
    )
    return source


# Both runs in one process, which loads the libraries once.
TRAIN = """
import sys
from p828.cli.main import dispatch
for name, *flags in (["plain"], ["deepspeed", "--engine", "deepspeed", "--deepspeed.stage", "2"]):
    assert dispatch(["train", sys.argv[1], "--name", name, *flags]) == 0
"""


def test_a_new_number_reaches_the_records_of_every_engine(
    with_more_numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other file knows of it. From stage 2 on, micro-batches go another way than the plain engine's."""
    pytest.importorskip("deepspeed")
    rate = 2.0**-10
    balance = {"update_rate": rate, "z_loss_weight": 1e-3}
    toml = write_toml(tmp_path, train={"steps": 4}, evaluation={"every": 0}, balance=balance)
    monkeypatch.setenv("PYTHONPATH", str(with_more_numbers))
    process = start(str(toml), cwd=tmp_path, launcher=("-c", TRAIN))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    plain, deepspeed = (
        [line for line in records.read(tmp_path / "runs" / name / "metrics.jsonl") if line["kind"] == "step"]
        for name in ("plain", "deepspeed")
    )
    assert [line["step"] for line in plain] == [line["step"] for line in deepspeed] == [1, 2, 3, 4]
    for ours, theirs in zip(plain, deepspeed, strict=True):
        # A step moves a bias by the rate, up or down, and then takes the mean move off all of them.
        assert len(ours["largest_bias"]) == 2
        assert all(0 < largest <= 2 * rate * ours["step"] for largest in ours["largest_bias"])
        assert ours["largest_bias"] == theirs["largest_bias"]
        assert ours["z_loss"] > 0
        assert ours["z_loss"] == pytest.approx(theirs["z_loss"], rel=1e-5)  # float32 sums in another order
