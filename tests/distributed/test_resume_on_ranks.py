"""What dies on so many ranks at one ZeRO stage goes on on so many others at another, as if nothing had been."""

import dataclasses
import random
import re
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from launch import (
    SHARDED,
    Run,
    Stage,
    assert_same_bits,
    assert_same_training,
    cases,
    config_that_reads_on,
    launched,
    messages,
    train,
    train_and_kill,
    write_config,
)

from p828.distributed.group import joined
from p828.engine.deepspeed.engine import DeepSpeedEngine, check_deepspeed
from p828.engine.plain import PlainEngine
from p828.runs import checkpoint
from p828.runs.tensors import tensors_of
from p828.train import checkpoint_writer
from runs import run_config

pytestmark = pytest.mark.xdist_group("ranks")
Copy = Callable[[Path], Path]

PLAIN = (None, 1)
RESUMED = re.compile(r"resumed from step \d+$", re.M)  # which depends on what was complete at the kill
STAGES = (*range(4), *SHARDED)
OTHER_RANKS = [((stage, before), (stage, after)) for stage in STAGES for before, after in ((2, 1), (1, 2), (2, 4))]
OTHER_STAGE = [((before, 2), (after, 2)) for before, after in ((1, 3), (3, 1), (2, 0), (0, 2))]
OTHER_STAGE += [((f"sharded-{before}", 2), (f"sharded-{after}", 2)) for before, after in ((1, 3), (3, 2), (2, 1))]
OTHER_ENGINE = [(PLAIN, (1, 2)), (PLAIN, (3, 2)), ((1, 2), PLAIN), ((3, 2), PLAIN)]
OTHER_ENGINE += [(PLAIN, ("sharded-3", 2)), (("sharded-3", 2), PLAIN), (("sharded-1", 2), PLAIN)]
OTHER_ENGINE += [((3, 2), ("sharded-1", 2)), (("sharded-2", 2), (1, 2)), ((0, 2), ("sharded-3", 4))]


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_ranks_go_on_bit_for_bit(config: Path, whole: Run, killed: Run, copied: Copy, stage: Stage) -> None:
    run = copied(killed(stage, 2))
    assert RESUMED.search(train(config, run, stage, 2))
    assert_same_bits(run, whole(stage, 2))


@pytest.mark.parametrize("before, after", cases(OTHER_RANKS + OTHER_STAGE + OTHER_ENGINE, short=[]))
def test_others_go_on(
    config: Path, whole: Run, killed: Run, copied: Copy, before: tuple[Stage, int], after: tuple[Stage, int]
) -> None:
    run = copied(killed(*before))
    assert RESUMED.search(train(config, run, *after))
    assert_same_training(run, whole(None, 1))


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path, stage: Stage) -> None:
    """Each rank's dropout goes on where it was, too."""
    config = write_config(tmp_path, model={"dropout": 0.1})
    train(config, tmp_path / "runs" / "whole", stage, 2)
    draw, run = random.Random(str(stage)), tmp_path / "runs" / "killed"
    for moment in (draw.randint(1, 3), draw.randint(5, 9), draw.randint(10, 15)):  # before any checkpoint, too
        train_and_kill(config, run, stage, 2, moment)
    train(config, run, stage, 2)
    assert_same_bits(run, tmp_path / "runs" / "whole")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_end_is_saved_by_all_ranks_and_goes_on(
    config: Path, whole: Run, tmp_path: Path, number: signal.Signals
) -> None:
    """The launcher passes the signal on."""
    run = tmp_path / "runs" / "asked"
    with launched(config, run, 3, 2) as launch:
        launch.wait_for_step(5)
        launch.process.send_signal(number)
        _, _, err = launch.end()
    (message,) = messages(err)
    found = re.fullmatch(rf"p828: stopped by {number.name} after step (\d+), which is saved; .*", message)
    assert found, message
    assert f"resumed from step {found[1]}" in train(config, run, 3, 2)
    assert_same_bits(run, whole(3, 2))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("stage, damage", cases(product((1, 3), (flip_a_bit, Path.unlink)), short=[(1, flip_a_bit)]))
def test_a_damaged_shard_is_named_quarantined_and_the_checkpoint_before_is_used(
    config: Path, whole: Run, copied: Copy, stage: int, damage: Callable[[Path], None]
) -> None:
    run = copied(whole(stage, 2))
    checkpoints = run / "checkpoints"
    damage(checkpoints / "step_00000020" / "optimizer.rank_0001.safetensors")
    half = checkpoints / ".step_00000024.tmp"
    half.mkdir()
    (half / "model.rank_0001.safetensors").write_bytes(b"half of")
    said = train(config, run, stage, 2)
    assert "step_00000020: optimizer.rank_0001.safetensors is" in said
    assert "quarantined as damaged_step_00000020" in said
    assert "resumed from step 16" in said
    assert (checkpoints / "damaged_step_00000020").exists()
    assert not half.exists()
    assert_same_bits(run, whole(stage, 2))


@pytest.mark.long
def test_a_run_whose_data_vanishes_is_saved_on_all_ranks_and_goes_on(tmp_path: Path) -> None:
    config, text = config_that_reads_on(tmp_path)
    whole, stopped = tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped"
    train(config, whole, 3, 2)
    with launched(config, stopped, 3, 2) as launch:
        launch.wait_for_step(3)
        text.rename(tmp_path / "away")
        code, _, err = launch.end()
    assert code == 1
    (said,) = (line for line in err.splitlines() if line.startswith("p828: "))  # by one rank, before torchrun's report
    assert "cannot be read: " in said
    assert "The run stops after step " in err
    (tmp_path / "away").rename(text)
    assert "resumed from step" in train(config, stopped, 3, 2)
    assert_same_bits(stopped, whole)


def test_a_checkpoint_from_before_the_first_step(tmp_path: Path) -> None:
    """The plain engine's, with and without the moments that older ones lack, goes on through DeepSpeed."""
    config = dataclasses.replace(run_config(tmp_path, train={"steps": 2}), engine="deepspeed")
    engine = PlainEngine(config)
    tensors = engine.state_dict()
    names = [name for name, _ in engine.model.named_parameters() if name.endswith("norm.weight")]
    gone = {f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in names}
    older = {**tensors, "optimizer": {name: v for name, v in tensors["optimizer"].items() if name not in gone}}
    with joined(config) as ranks:
        loaded = DeepSpeedEngine(config, ranks, check_deepspeed(config, ranks))
        for number, given in enumerate((tensors, older)):
            path = checkpoint_writer.save(tmp_path / str(number), 0, given, {})
            with checkpoint.opened(path) as saved:
                loaded.load_state_dict(saved.tensors)
            for name, value in loaded.state_dict()["optimizer"].items():
                (tensor,) = tensors_of(value)
                assert not tensor.any(), name
