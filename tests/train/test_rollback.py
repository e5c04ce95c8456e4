"""Going back after bad steps, and past the data that made them bad."""

import random
import shutil
from pathlib import Path

import pytest

from p828.cli.main import dispatch
from p828.runs import checkpoint, file_names, records
from p828.runs.train_state import EMA_STEPS, TrainState
from p828.train import checkpoint_writer
from runs import write_text, write_toml
from same_run import assert_same_run

STEPS = 60


@pytest.fixture
def odd_text(tmp_path: Path) -> Path:
    """Documents in words, and one of some steps' length that is noise."""
    text = write_text(tmp_path / "text", documents=30)
    noise = random.Random(3).choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=450)
    (text / "noise.txt").write_text("".join(noise))
    return tmp_path


def train(directory: Path, name: str, *flags: str, **sections: dict[str, object]) -> int:
    path = write_toml(
        directory,
        data=sections.pop("data", {"shuffle_rows": 1, "block_documents": 1}),
        train={"steps": STEPS},
        evaluation={"every": 0},
        **{"checkpoint": {"every": 4, "keep_last": STEPS}, **sections},
    )
    return dispatch(["train", str(path), "--name", name, "--runs_dir", str(directory / "runs"), *flags])


def events(run: Path, kind: str) -> list[dict[str, object]]:
    return [line for line in records.read(run / "metrics.jsonl") if line["kind"] == "event" and line["event"] == kind]


def test_it_goes_on_as_from_that_checkpoint_with_the_data_that_comes_next(odd_text: Path) -> None:
    runs = odd_text / "runs"
    assert train(odd_text, "back", "--rollback.after-steps", "3") == 0
    (event,) = events(runs / "back", "rollback")
    back = int(event["step"])  # type: ignore[call-overload]
    assert f"back to step {back}: 3 steps in a row up to step" in str(event["text"])
    bad = int(str(event["text"]).split("up to step ")[1].split()[0])
    assert bad - 3 - 4 < back <= bad - 3, "the newest checkpoint before the bad steps"
    losses = [line["loss"] for line in records.read(runs / "back" / "metrics.jsonl") if line["kind"] == "step"]
    assert len(losses) == STEPS

    # The same by hand: from a run without it, the weights of the one step and the place in the data of the other.
    assert train(odd_text, "whole", checkpoint={"every": 1, "keep_last": STEPS}) == 0
    assert events(runs / "whole", "rollback") == []
    shutil.copytree(runs / "whole", runs / "by_hand")
    steps = runs / "by_hand" / "checkpoints"
    good, later = (checkpoint.load(steps / file_names.name_of(step)) for step in (back, bad))
    for path in steps.iterdir():
        shutil.rmtree(path)
    state = {**good.state, "data": later.state["data"]}
    state["progress"]["rollbacks"] = 1
    checkpoint_writer.save(steps, back, good.tensors, state)
    assert train(odd_text, "by_hand") == 0
    assert_same_run(runs / "by_hand", runs / "back", STEPS)


def test_a_mixtures_weights_are_those_of_the_step_that_a_run_went_back_to(odd_text: Path) -> None:
    other = write_text(odd_text / "other", documents=30)  # the same words, lest the change be a spike
    sources = [
        {"name": "odd", "source": "files", "files": [str(odd_text / "text" / "*.txt")], "weights": [1.0, 0.0]},
        {"name": "other", "source": "files", "files": [str(other / "*.txt")], "weights": [0.0, 1.0]},
    ]
    data: dict[str, object] = {"mixture": sources, "mixture_steps": [0, 50], "shuffle_rows": 1, "block_documents": 1}
    assert train(odd_text, "back", "--rollback.after-steps", "3", data=data) == 0
    (event,) = events(odd_text / "runs" / "back", "rollback")
    bad = int(str(event["text"]).split("up to step ")[1].split()[0])
    assert int(event["step"]) < bad < 50  # type: ignore[call-overload]
    lines = [line for line in records.read(odd_text / "runs" / "back" / "metrics.jsonl") if line["kind"] == "step"]
    tokens = {line["step"]: line["source_tokens"]["other"] for line in lines}
    assert [tokens[step] for step in (49, 50)] == [0, 0]
    assert tokens[51] == lines[0]["tokens"], "the first step with the new weights"


def test_a_run_that_is_rolled_back_too_often_ends(odd_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--rollback.after-steps", "2", "--rollback.limit", "1", "--optimizer.learning-rate", "1e30")
    code = train(odd_text, "broken", *flags, schedule={"warmup_steps": 0}, checkpoint={"every": 1})
    said = capsys.readouterr().err
    assert code == 1
    assert "2 steps in a row up to step 3 were not finite or had a loss far above the usual" in said
    assert "rolled back 1 times before" in said
    (event,) = events(odd_text / "runs" / "broken", "rollback")
    assert "back to step 1" in str(event["text"])


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    odd_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rollback.after-steps", "2", "--optimizer.learning-rate", "1e30")
    assert train(odd_text, "broken", *flags, schedule={"warmup_steps": 0}, checkpoint={"every": 1000}) == 1
    assert "there is no checkpoint to go back to" in capsys.readouterr().err
    assert not list((odd_text / "runs" / "broken" / "checkpoints").glob("*"))


def test_what_counts_as_anomalous() -> None:
    state = TrainState()

    def anomalous(loss: float, applied: bool = True) -> int:
        state.update(loss, applied, spike_threshold=1.0)
        return state.anomalous_steps

    assert [anomalous(loss) for loss in (4.0, 2.0, 3.0)] == [0, 0, 0]
    assert state.loss_ema == pytest.approx(3.0)  # the mean of what there is
    assert [anomalous(4.1), anomalous(float("nan"), applied=False), anomalous(9.0)] == [1, 2, 3]
    assert state.loss_ema == pytest.approx(3.0)  # of good steps only
    assert anomalous(3.9) == 0
    for _ in range(3 * EMA_STEPS):
        anomalous(2.0)
    assert 2.0 < state.loss_ema < 2.1  # type: ignore[operator]


def test_a_checkpoint_with_the_earlier_names_of_the_state_is_read(odd_text: Path) -> None:
    """A run that goes on from one ends with the same bits as a run that goes on from today's."""
    runs = odd_text / "runs"
    assert train(odd_text, "whole", "--train.steps", "44", "--rollback.after-steps", "3") == 0
    shutil.copytree(runs / "whole", runs / "renamed")
    directory = runs / "renamed" / "checkpoints"
    saved = checkpoint.load(checkpoint.resolve(directory))
    earlier = {"anomalous_steps": "bad_steps", "loss_ema": "usual_loss", "loss_ema_steps": "usual_steps"}
    state = {earlier.get(name, name): value for name, value in saved.state["progress"].items()}
    assert {*earlier.values()} <= {*state}
    assert state["usual_steps"] > 1
    checkpoint_writer.save(directory, saved.step, saved.tensors, {**saved.state, "progress": state})
    for name in ("whole", "renamed"):
        assert train(odd_text, name, "--rollback.after-steps", "3") == 0
    assert_same_run(runs / "whole", runs / "renamed", STEPS)


@pytest.mark.parametrize("every", [1, STEPS])
def test_a_run_that_is_stopped_says_whether_a_checkpoint_was_saved(
    every: int, odd_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--optimizer.learning-rate", "1e30", "--optimizer.max-grad-norm", "1e30")
    assert train(odd_text, "lost", *flags, checkpoint={"every": every}) == 1
    error, checkpoints = capsys.readouterr().err, odd_text / "runs" / "lost" / "checkpoints"
    saved = f"{checkpoints} keeps what was saved" if every == 1 else "no checkpoint was saved before"
    assert f"the run stops here, and {saved}.\n" in error
    assert checkpoints.exists() == (every == 1)
