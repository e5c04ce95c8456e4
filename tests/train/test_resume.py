"""Training 2N steps equals training N, dying, and going on: bit for bit on a CPU."""

import random
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from p828.cli.main import dispatch
from p828.runs import records
from runs import in_process, start, wait_for_step, write_text, write_toml
from same_run import assert_same_run, comparable_records, final_state


def test_two_resumes_equal_an_uninterrupted_run(tmp_path: Path) -> None:
    # not a cosine: where that is depends on the number of steps, which is what changes here
    path = str(write_toml(tmp_path, model={"dropout": 0.1}, schedule={"kind": "constant"}))
    for name, stops in (("whole", [12]), ("pieces", [4, 8, 12])):
        for steps in stops:
            arguments = ["--runs-dir", str(tmp_path / "runs"), "--name", name, "--train.steps", str(steps)]
            assert dispatch(["train", path, *arguments]) == 0
    ours, theirs = final_state(tmp_path / "runs" / "whole", 12), final_state(tmp_path / "runs" / "pieces", 12)
    for part in ("model", "optimizer", "random"):
        assert all(torch.equal(tensor, theirs.tensors[part][name]) for name, tensor in ours.tensors[part].items())
    assert ours.state["data"] == theirs.state["data"]


@pytest.mark.long
def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path) -> None:
    path = str(write_toml(tmp_path, model={"dropout": 0.1}, train={"steps": 60}, checkpoint={"every": 7}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    draw = random.Random(828)
    moments = draw.randint(1, 6), draw.randint(10, 30), draw.randint(31, 55)  # before any checkpoint, too
    train_with_kills(path, moments, tmp_path)
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed", step=60)


def train_with_kills(path: str, moments: Sequence[int], tmp_path: Path) -> None:
    """Train the run `killed` to its end, through a `kill -9` after each of these steps."""
    for kill_at in moments:
        process = start("train", path, "--name", "killed", cwd=tmp_path)
        wait_for_step(process, kill_at)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, said = in_process("train", path, "--name", "killed", cwd=tmp_path)
    assert code == 0, said


def test_a_damaged_checkpoint_is_named_quarantined_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write_toml(tmp_path))
    assert dispatch(["train", path, "--name", "whole"]) == 0
    assert dispatch(["train", path, "--name", "damaged"]) == 0
    checkpoints = tmp_path / "runs" / "damaged" / "checkpoints"
    weights = checkpoints / "step_00000012" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert dispatch(["train", path, "--name", "damaged"]) == 0
    said = capsys.readouterr().out
    assert "step_00000012" in said
    assert "model.safetensors" in said
    assert (checkpoints / "damaged_step_00000012").exists()
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "damaged", step=12)


def test_a_finished_run_says_so_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write_toml(tmp_path))
    assert dispatch(["train", path]) == 0
    before = comparable_records(tmp_path / "runs" / "tiny")
    assert dispatch(["train", path]) == 0
    assert "runs/tiny is complete at step 12" in capsys.readouterr().out
    assert comparable_records(tmp_path / "runs" / "tiny") == before


def test_a_run_that_had_checkpoints_never_begins_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write_toml(tmp_path))
    assert dispatch(["train", path]) == 0
    run = tmp_path / "runs" / "tiny"
    before, steps = comparable_records(run), sorted((run / "checkpoints").iterdir())
    for step in steps:
        (step / "state.json").rename(step / "moved.json")
    for _ in range(2):
        capsys.readouterr()
        assert dispatch(["train", path]) == 2
        said = capsys.readouterr().err.splitlines()
        assert "no complete checkpoint to go on from" in said[0]
        assert f"{steps[-1].name}: state.json is missing" in said[0]
        assert said[1:] == ["To begin again, give another --name or remove runs/tiny"]
    assert sorted((run / "checkpoints").iterdir()) == steps
    assert comparable_records(run) == before
    (steps[-1] / "moved.json").rename(steps[-1] / "state.json")
    assert dispatch(["train", path]) == 0
    shutil.move(run / "checkpoints", tmp_path / "away")
    assert dispatch(["train", path]) == 2
    assert "its records tell of one of step 12" in capsys.readouterr().err
    (run / "checkpoints").symlink_to(tmp_path / "not-mounted")
    assert dispatch(["train", path]) == 2
    assert f"is a link to {tmp_path / 'not-mounted'}, which is not there" in capsys.readouterr().err
    (run / "checkpoints").unlink()
    (run / "checkpoints").symlink_to(tmp_path / "away")
    assert dispatch(["train", path]) == 0


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    path = str(write_toml(tmp_path, train={"steps": 100_000}))
    first = start("train", path, cwd=tmp_path)
    wait_for_step(first, 1)
    code, _, said = in_process("train", path, cwd=tmp_path)
    assert code == 2
    assert "another p828 train is at work on this run" in said
    first.send_signal(signal.SIGKILL)
    first.communicate()
    code, _, said = in_process("train", path, "--train.steps", "1", cwd=tmp_path)
    assert code == 0, said


def test_data_that_changed_since_the_checkpoint_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write_toml(tmp_path))
    assert dispatch(["train", path, "--train.steps", "6"]) == 0
    text = sorted((tmp_path / "text").iterdir())[0]
    text.write_text(text.read_text() + "more")
    assert dispatch(["train", path]) == 2
    assert "not the data of the checkpoint" in capsys.readouterr().err


def test_what_a_checkpoint_was_made_with_counts_and_not_an_edited_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dispatch(["train", str(write_toml(tmp_path))]) == 0
    edited = tmp_path / "runs" / "tiny" / "config.toml"
    for before, after in (("hidden_size = 32", "hidden_size = 48"), ("sequence_length = 32", "sequence_length = 16")):
        content = edited.read_text()
        edited.write_text(content.replace(before, after))
        assert dispatch(["train", str(edited), "--train.steps", "14"]) == 2
        assert before in capsys.readouterr().err
        edited.write_text(content)


def test_a_directory_killed_while_it_was_made_is_taken_for_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / ".config.toml.tmp").write_text("[mod")
    assert dispatch(["train", str(write_toml(tmp_path))]) == 0


@pytest.mark.long
def test_kill_9_while_training_on_a_mixture_changes_nothing(tmp_path: Path) -> None:
    prepared = {"name": "prepared", "prepared": str(tmp_path / "prepared"), "weights": [1.0, 0.2]}
    streamed = {"name": "text", "weights": [0.3, 0.8]}
    files = {"source": "files", "files": [str(tmp_path / "text" / "*.txt")]}
    mixture = [{**prepared, **files}, {**streamed, **files}]
    data = {"mixture": mixture, "mixture_steps": [0, 15], "streams": 2, "packing": "best_fit", "shuffle_rows": 16}
    path = str(write_toml(tmp_path, data=data, train={"steps": 30}, checkpoint={"every": 7}))
    assert in_process("prepare", path, cwd=tmp_path)[0] == 0
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    train_with_kills(path, (9, 20), tmp_path)
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed", step=30)
    last = [line for line in records.read(tmp_path / "runs" / "whole" / "metrics.jsonl") if line["kind"] == "step"][-1]
    assert sum(last["source_tokens"].values()) == last["tokens"]
    assert last["source_tokens"]["text"] > last["source_tokens"]["prepared"] > 0
    assert 0 < last["cut_documents"] <= last["documents"]


def test_a_run_whose_data_vanishes_is_saved_and_goes_on(tmp_path: Path) -> None:
    # Some 50,000 tokens are read at a time, of which a step takes 4,096.
    write_text(tmp_path / "more", documents=1500, seed=1)
    files = [str(tmp_path / "more" / "*.txt")]
    data = {"files": files, "sequence_length": 512, "block_documents": 4, "shuffle_rows": 4, "read_retries": 1}
    path = str(
        write_toml(
            tmp_path,
            model={"max_position_embeddings": 512},
            data=data,
            train={"steps": 30, "micro_batch_size": 8, "gradient_accumulation": 1},
            evaluation={"every": 0},
            checkpoint={"every": 900},
        )
    )
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    process = start("train", path, "--name", "stopped", cwd=tmp_path)
    wait_for_step(process, 3)
    (tmp_path / "more").rename(tmp_path / "away")
    said = process.communicate()[1]
    assert process.returncode == 1
    assert re.search(r"cannot be read: .*No such file[^\n]*\nThe run stops after step (\d+), which is saved", said), (
        said
    )
    (tmp_path / "away").rename(tmp_path / "more")
    code, _, said = in_process("train", path, "--name", "stopped", cwd=tmp_path)
    assert code == 0, said
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped", step=30)
