"""The batch of any step of a run is made again: the hashes in its records are the oracle."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from p828.cli.main import dispatch
from p828.runs import records
from p828.runs.step_batch import documents_of_step
from runs import write_text, write_toml

STEPS = 30
OLD = Path(__file__).parents[1] / "data_of_old_versions"


def train(directory: Path, name: str, **sections: Any) -> Path:
    train = {"steps": STEPS, **sections.pop("train", {})}
    checkpoint = {"every": 4, "keep_last": STEPS}
    given = {"train": train, "evaluation": {"every": 0}, "checkpoint": checkpoint, **sections}
    path = write_toml(directory, **given)
    assert dispatch(["train", str(path), "--name", name, "--runs_dir", str(directory / "runs")]) == 0
    return directory / "runs" / name


def hashes(run: Path) -> dict[int, str]:
    return {line["step"]: line["rows"] for line in records.read(run / "metrics.jsonl") if line["kind"] == "step"}


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that left data out twice, from a fifth of a document that is noise."""
    directory = tmp_path_factory.mktemp("batch")
    text = write_text(directory / "text", documents=30)
    for number in (1, 2):
        (text / f"noise{number}.txt").write_text("XQ" * 30 + "ZJKV WPYUOLMNRST" * (10 * number))
    return train(
        directory,
        "back",
        data={"shuffle_rows": 1, "block_documents": 1},
        rollback={"after_steps": 1, "spike_threshold": 0.4, "limit": 30},
    )


def test_every_step_is_made_again_from_its_checkpoint(rolled_back: Path) -> None:
    expected = {step: rows for step, rows in hashes(rolled_back).items() if step % 3 == 1 or step > STEPS - 4}
    assert {step: documents_of_step(rolled_back, step).hash for step in expected} == expected


def test_from_the_beginning_too_and_past_what_rollbacks_left_out(rolled_back: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(rolled_back, bare)
    shutil.rmtree(bare / "checkpoints")
    lines = records.read(bare / "metrics.jsonl")
    assert sum(line.get("event") == "rollback" for line in lines) >= 2
    expected = hashes(bare)
    for step in (1, STEPS // 2, STEPS):
        found = documents_of_step(bare, step)
        assert (found.start, found.hash, found.recorded) == (None, expected[step], expected[step])


def test_a_step_of_a_mixture_whose_weights_change(tmp_path: Path) -> None:
    for number in range(2):
        write_text(tmp_path / f"text{number}", seed=number)
    sources = [
        {"name": f"s{n}", "source": "files", "files": [str(tmp_path / f"text{n}")], "weights": weights}
        for n, weights in enumerate(([1.0, 0.2], [0.3, 2.0]))
    ]
    data = {"mixture": sources, "mixture_steps": [0, 13], "sequence_length": 32, "shuffle_rows": 8, "streams": 2}
    run = train(tmp_path, "mixed", data=data)
    expected = hashes(run)
    for step in (3, 13, 14, STEPS):
        found = documents_of_step(run, step)
        assert found.hash == expected[step]
        for row in found.rows:
            assert all(f"text{row.source[1]}/" in document.shard for document in row.documents)
    shutil.rmtree(run / "checkpoints")
    assert documents_of_step(run, 20).hash == expected[20]


def test_a_run_that_went_on_with_steps_of_other_sizes(tmp_path: Path) -> None:
    run = train(tmp_path, "grown", train={"steps": 6})
    train(tmp_path, "grown", train={"steps": 12, "gradient_accumulation": 4})
    expected = hashes(run)
    rows = {
        step: (found := documents_of_step(run, step)).hash == expected[step] and len(found.rows) for step in expected
    }
    assert rows == {step: 4 if step <= 6 else 8 for step in range(1, 13)}


@pytest.mark.parametrize("run, step", [("whole-tensors", 7), ("two-ranks", 7), ("two-ranks", 3)])
def test_a_run_of_an_old_version(run: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    found = documents_of_step(Path("runs", run), step)
    assert found.recorded is not None
    assert found.hash == found.recorded


def test_the_command_prints_rows_and_documents(rolled_back: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["batch", str(rolled_back), "--step", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["is_as_recorded"], len(found["rows"])) == (9, True, 4)
    document = found["rows"][0]["documents"][0]
    assert Path(document["shard"]).is_file()
    assert dispatch(["batch", str(rolled_back), "--step", "9"]) == 0
    said = capsys.readouterr().out
    assert "as in the step's record" in said
    assert "row 4, files" in said


def test_data_that_changed_is_noticed(rolled_back: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is another is named; without a checkpoint, the hash of the rows differs."""
    run, texts = tmp_path / "run", tmp_path / "text"
    shutil.copytree(rolled_back, run)
    shutil.copytree(rolled_back.parents[1] / "text", texts)
    config = (run / "config.toml").read_text().replace(str(rolled_back.parents[1] / "text"), str(texts))
    (run / "config.toml").write_text(config)
    assert dispatch(["batch", str(run), "--step", "9"]) == 0, "it may lie elsewhere"
    for path in texts.glob("0*.txt"):
        path.write_text(path.read_text().replace("a", "b"))
    assert dispatch(["batch", str(run), "--step", "9"]) == 2
    assert "not the data of the checkpoint" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert dispatch(["batch", str(run), "--step", "9"]) == 1
    out, err = capsys.readouterr()
    assert "row 1, files" in out
    assert "these are not the rows of step 9" in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--step", "0"], "there is no step 0 of it; steps 1 to 30 are accepted"),
        (["--step", "31"], "there is no step 31 of it; steps 1 to 30"),
        (["--step", "x"], "--step x: a whole number is accepted"),
        ([], "no --step given"),
        (["--stp", "3"], "did you mean --step?"),
    ],
)
def test_wrong_input(rolled_back: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["batch", str(rolled_back), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_a_readable_checkpoint_goes_from_the_one_before(rolled_back: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(rolled_back, run)
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name < "step_00000020")
    (newest / "state.json").write_text("{")
    found = documents_of_step(run, 20)
    assert found.hash == hashes(run)[20]
    assert found.start is not None
    assert found.start != newest


def test_losses_say_which_documents_are_hard(rolled_back: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["batch", str(rolled_back), "--step", "9", "--losses", "--device", "cpu", "--json"]
    assert dispatch(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    assert sorted(row["row"] for row in rows) == [1, 2, 3, 4]
    own = next(line for line in records.read(rolled_back / "metrics.jsonl") if line.get("rows") and line["step"] == 9)
    # of the checkpoint of step 8, which is the model that made step 9
    assert sum(row["loss"] for row in rows) / 4 == pytest.approx(own["loss"], abs=1e-4)
    assert dispatch(["batch", str(rolled_back), "--step", "1", "--losses"]) == 2
    assert "no checkpoint before step 1 is left" in capsys.readouterr().err
    assert dispatch(["batch", str(rolled_back), "--step", "1", "--device", "cpu"]) == 2
