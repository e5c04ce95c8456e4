"""What differs between two runs, against what was made to differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from p828.cli.compare import _pairs
from p828.cli.main import dispatch
from p828.config import Config
from p828.runs.side_by_side import APART, SMOOTHED, Comparison, Difference, side_by_side
from runs import write_text, write_toml

OLD = Path(__file__).parents[1] / "data_of_old_versions" / "runs"


def train(directory: Path, name: str, **sections: dict[str, Any]) -> Path:
    path = write_toml(directory, **sections)
    assert dispatch(["train", str(path), "--name", name, "--runs_dir", str(directory / "runs")]) == 0
    return directory / "runs" / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("compare"), "whole")


@pytest.fixture
def other(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "other")
    return tmp_path / "other"


def change(run: Path, edit: Any) -> None:
    """Rewrite the records with those that `edit` gives, or without those of which it gives None."""
    path = run / "metrics.jsonl"
    found = [edit(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in found if record))


def settings(found: Comparison) -> dict[str, tuple[Any, Any]]:
    return {one.name: (one.first, one.second) for one in found.settings}


def test_a_run_beside_itself(whole: Path, other: Path) -> None:
    found = side_by_side(whole, other)
    assert (found.settings, found.versions, found.data, found.speed) == ([], [], [], [])
    assert found.same_data == ["tokenizer", "data"]
    assert (found.first_other_rows, found.rows_compared) == (None, 12)
    assert found.curves is not None
    assert (found.curves.first_unequal_step, found.curves.apart_from_step, found.curves.by_tokens) == (None, None, [])
    assert [point.at for point in found.curves.validation] == [5, 10, 12]


def test_runs_of_other_settings_and_another_seed(whole: Path, tmp_path: Path) -> None:
    """A seed gives other rows from the first step on, and twice the rows other tokens at a step."""
    text = {"files": [str(whole.parents[1] / "text" / "*.txt")]}
    values = {"micro_batch_size": 4, "seed": 3}
    run = train(tmp_path, "other", data={**text}, train=values, optimizer={"learning_rate": 3e-4})
    found = side_by_side(whole, run)
    assert settings(found) == {
        "optimizer.learning_rate": (1e-2, 3e-4), "train.micro_batch_size": (2, 4), "train.seed": (0, 3),
    }  # fmt: skip
    default = {one.name: one.default for one in found.settings}
    assert default["optimizer.learning_rate"] == Config().optimizer.learning_rate
    assert found.first_other_rows == 1
    assert ("tokens trained on", 1536, 3072) in [(one.name, one.first, one.second) for one in found.data]
    curves = found.curves
    assert curves is not None
    assert curves.first_unequal_step == 1
    lines = [[json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (whole, run)]
    losses = [{line["tokens"]: line["loss"] for line in of if line["kind"] == "step"} for of in lines]
    for point in curves.by_tokens:  # 128 and 256 tokens a step
        means = [
            sum(known := [loss for tokens, loss in of.items() if tokens <= -(-point.at // size) * size]) / len(known)
            for of, size in zip(losses, (128, 256), strict=True)
        ]
        assert (point.first, point.second) == pytest.approx(means)
    assert [point.at for point in curves.by_tokens] == [384, 768, 1152, 1536]


def test_where_rows_and_losses_part(whole: Path, other: Path) -> None:
    def edit(record: dict[str, Any]) -> dict[str, Any]:
        if record["kind"] == "step" and record["step"] >= 8:
            record["rows"] = "00000000"
        if record["kind"] == "step" and record["step"] >= 9:
            record["loss"] += 1.5 * APART * 10
        return record

    change(other, edit)
    found = side_by_side(whole, other)
    assert found.first_other_rows == 8
    assert found.curves is not None
    assert found.curves.first_unequal_step == 9
    assert SMOOTHED > 12
    assert found.curves.apart_from_step == 9, "0.75 nats in the mean of nine steps"


def test_a_damaged_line_makes_no_difference(whole: Path, other: Path) -> None:
    """The means are over the steps that both have."""
    change(other, lambda record: None if record["kind"] == "step" and record["step"] == 3 else record)
    curves = side_by_side(whole, other).curves
    assert curves is not None
    assert (curves.first_unequal_step, curves.apart_from_step) == (None, None)
    assert all(point.first == point.second for point in curves.by_step)


def test_losses_that_are_not_finite_hide_nothing(whole: Path, other: Path) -> None:
    change(other, lambda record: {**record, "loss": "NaN"} if record["step"] == 3 and "rows" in record else record)
    curves = side_by_side(whole, other).curves
    assert curves is not None
    assert curves.first_unequal_step == 3
    assert curves.by_step[-1].second == pytest.approx(curves.by_step[-1].first, abs=0.2)
    assert side_by_side(other, other).curves.first_unequal_step is None  # type: ignore[union-attr]


def test_other_text_has_another_fingerprint(whole: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "text", seed=1)
    run = train(tmp_path, "other", tokenizer={"name": str(whole / "tokenizer.json")})
    found = side_by_side(whole, run)
    assert "tokenizer" in found.same_data
    assert "data" in [one.name for one in found.data]


def test_runs_of_old_versions_and_what_is_left_of_a_run(whole: Path, other: Path) -> None:
    found = side_by_side(OLD / "two-ranks", OLD / "whole-tensors")
    assert settings(found) == {"engine": ("deepspeed", "plain"), "train.gradient_accumulation": (1, 2)}
    assert (found.first_other_rows, found.rows_compared, found.versions) == (None, 7, [])
    assert side_by_side(OLD / "two-ranks", whole).versions, "other versions wrote them"
    shutil.rmtree(other / "checkpoints")
    (other / "metrics.jsonl").unlink()
    found = side_by_side(whole, other)
    assert (found.curves, found.rows_compared, found.same_data) == (None, 0, [])


def test_a_checkpoint_says_the_settings_where_config_toml_is_gone(whole: Path, other: Path) -> None:
    (other / "config.toml").unlink()
    assert side_by_side(whole, other).settings == []


def test_the_command(whole: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = other / "config.toml"
    path.write_text(path.read_text().replace("weight_decay = 0.01", "weight_decay = 0.1"))
    assert dispatch(["compare", str(whole), str(other)]) == 0
    said = capsys.readouterr().out
    assert "optimizer.weight_decay" in said
    assert "0.01 (default)" in said
    assert "the same rows in all 12 steps of both" in said
    assert max(map(len, said.splitlines()[3:])) <= 80
    assert dispatch(["compare", str(whole), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == [{"name": "optimizer.weight_decay", "first": 0.01, "second": 0.1, "default": 0.01}]


def test_every_command_knows_a_run_by_its_name(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole.parents[1])
    for arguments in (["compare", "whole", "runs/whole"], ["doctor", "whole"], ["batch", "whole", "--step", "3"]):
        assert dispatch(arguments) == 0, arguments
    assert dispatch(["plan", "whole", "--train.device", "auto"]) == 0, capsys.readouterr().err
    assert dispatch(["batch", "whale", "--step", "3"]) == 2


@pytest.mark.parametrize("columns", [46, 60, 100])
def test_what_is_told_of_runs_fits_the_terminal(
    whole: Path, other: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole.parents[1])
    monkeypatch.setenv("COLUMNS", str(columns))
    shutil.copytree(whole, other / "runs" / "failed")
    ended = {"kind": "event", "event": "ended", "step": 12, "state": "failed", "why": "a long reason, " * 9}
    path = other / "runs" / "failed" / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps(ended) + "\n")
    change(other, lambda record: {**record, "loss": 9.0} if record["kind"] == "step" else record)
    shutil.copytree(other, "other", dirs_exist_ok=True)
    told: dict[str, str] = {}
    for arguments in (
        ["compare", "whole", "other"], ["batch", "whole", "--step", "3"], ["runs", "other/runs"],
        ["doctor", "other"], ["plan", "whole", "--train.device", "auto", "--gpus", "1"],
    ):  # fmt: skip
        dispatch(arguments)
        told[arguments[0]] = capsys.readouterr().out
    shard = str(next((whole.parents[1] / "text").iterdir()).parent)
    for command, out in told.items():
        longest = [line for line in out.splitlines() if len(line) > columns and shard not in line]
        assert out, command
        assert longest == [], command


def test_a_short_value_beside_a_long_one_takes_a_line_each() -> None:
    one = Difference("data.files", "a.txt", "b" * 40)
    assert len(_pairs([one])) == 2


def test_wrong_input(whole: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["compare", str(whole)]) == 2
    assert "no RUN given. Usage: p828 compare RUN RUN" in capsys.readouterr().err
    assert dispatch(["compare", str(whole), str(whole) + "s"]) == 2
    assert f"no such directory; did you mean {whole}?" in capsys.readouterr().err
    assert dispatch(["compare", str(whole), str(tmp_path)]) == 2
    assert "no run: it holds no config.toml" in capsys.readouterr().err
    (other / "config.toml").write_text("a = = 1")
    assert dispatch(["compare", str(whole), str(other)]) == 2
    assert "cannot be read as TOML" in capsys.readouterr().err
