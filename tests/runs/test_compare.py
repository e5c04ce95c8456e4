import json
import shutil
from pathlib import Path

import pytest

from p828.cli.main import dispatch
from p828.runs import checkpoint
from p828.runs.compare import distance_of_losses, first_difference
from p828.train import checkpoint_writer
from runs import write_toml

LAST = Path("checkpoints") / "step_00000012"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("comparison")
    assert (
        dispatch(["train", str(write_toml(directory)), "--runs-dir", str(directory / "runs"), "--name", "whole"]) == 0
    )
    return directory / "runs" / "whole"


@pytest.fixture
def other(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    shutil.copytree(whole, tmp_path / "other")
    return tmp_path / "other"


def save_again(run: Path, loaded: checkpoint.Checkpoint) -> None:
    checkpoint_writer.save(run / "checkpoints", loaded.step, loaded.tensors, loaded.state)


def change_records(run: Path, kind: str, key: str, value: object) -> None:
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    next(record for record in records if record["kind"] == kind and record["step"] >= 5)[key] = value
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_is_the_same_as_itself(whole: Path, other: Path) -> None:
    assert first_difference(whole, other) is None
    assert distance_of_losses(whole, other) == (0.0, None)


@pytest.mark.parametrize("part", ["model", "optimizer", "random"])
def test_one_bit_of_one_tensor_is_a_difference(whole: Path, other: Path, part: str) -> None:
    loaded = checkpoint.load(other / LAST)
    name = sorted(loaded.tensors[part])[0]
    loaded.tensors[part][name].view(-1).view(dtype=loaded.tensors[part][name].dtype).numpy().view("u1")[0] ^= 1
    save_again(other, loaded)
    said = first_difference(whole, other)
    assert said is not None
    assert said.startswith(f"{part}: 1 of")
    assert name in said


@pytest.mark.parametrize("part, key", [("progress", "tokens"), ("data", "batch")])
def test_progress_and_place_in_the_data_count(whole: Path, other: Path, part: str, key: str) -> None:
    loaded = checkpoint.load(other / LAST)
    loaded.state[part][key] += 1
    save_again(other, loaded)
    assert (
        first_difference(whole, other) == f"{part}.{key} is {loaded.state[part][key] - 1} and {loaded.state[part][key]}"
    )


def test_records_count_but_not_what_the_machine_did(whole: Path, other: Path) -> None:
    change_records(other, "step", "seconds", 99.0)
    assert first_difference(whole, other) is None
    change_records(other, "step", "loss", 1.5)
    assert "record step of step 5.loss is" in str(first_difference(whole, other))
    distance, nothing = distance_of_losses(whole, other)
    assert distance > 1
    assert nothing is None
    change_records(other, "step", "tokens", 7)
    assert "step 5: tokens is" in str(distance_of_losses(whole, other)[1])


def test_a_run_that_ended_earlier_is_different(whole: Path, other: Path) -> None:
    shutil.rmtree(other / LAST)
    assert first_difference(whole, other) == "one ended at step 12, the other at step 10"


def test_a_loss_that_is_no_number_is_far_from_one_that_is(whole: Path, other: Path) -> None:
    records = other / "metrics.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    step = next(line for line in lines if line["kind"] == "step" and line["step"] == 6)
    step["loss"] = "NaN"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert distance_of_losses(whole, other) == (float("inf"), None)
    assert distance_of_losses(other, other) == (0.0, None)


def test_zero_is_not_minus_zero(whole: Path, other: Path) -> None:
    loaded = checkpoint.load(other / LAST)
    state = loaded.tensors["model"]
    for run, zero in ((whole.parent / "plus", 0.0), (other, -0.0)):
        state["model.norm.weight"][0] = zero
        checkpoint_writer.save(run / "checkpoints", loaded.step, loaded.tensors, loaded.state)
        shutil.copy(whole / "metrics.jsonl", run / "metrics.jsonl")
    assert first_difference(whole.parent / "plus", other) == "model: 1 of 32 numbers of model.norm.weight differ"


def test_other_rows_are_a_difference_however_near_the_losses(whole: Path, other: Path) -> None:
    records = other / "metrics.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len({line["rows"] for line in steps}) == len(steps)
    steps[3]["rows"], steps[4]["rows"] = steps[4]["rows"], steps[3]["rows"]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    distance, difference = distance_of_losses(whole, other)
    assert distance == float("inf")
    assert difference is not None
    assert difference.startswith("step 4: rows is ")
