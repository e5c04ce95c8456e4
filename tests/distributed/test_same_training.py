"""However many ranks share a step, and whatever ZeRO shards, it is one device's step."""

from itertools import product
from pathlib import Path

import pytest
import torch
from launch import (
    SHARDED,
    Run,
    Stage,
    assert_same_bits,
    assert_same_training,
    cases,
    final_state,
    steps,
    train,
    train_and_kill,
    write_config,
)

pytestmark = pytest.mark.xdist_group("ranks")
GENTLE = {"learning_rate": 1e-3}  # at the tiny model's own rate, losses jump, and rounding moves the jumps


@pytest.mark.parametrize("stage, ranks", cases(product((*range(4), *SHARDED), (1, 2, 4)), short=[(1, 2), (3, 2)]))
def test_ranks_train_as_one_device_does(whole: Run, stage: Stage, ranks: int) -> None:
    assert_same_training(whole(stage, ranks), whole(None, 1))
    assert all(len(line.get("rank_memory_bytes", [0])) == ranks for line in steps(whole(stage, ranks)))


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3, *SHARDED])
def test_bfloat16_learns_and_keeps_the_bias_in_float32(tmp_path: Path, stage: Stage) -> None:
    rate = 2.0**-10  # sums of it are exact
    config = write_config(tmp_path, train={"dtype": "bfloat16"}, balance={"update_rate": rate})
    run = tmp_path / "runs" / "bfloat16"
    train(config, run, stage, 2)
    losses = [line["loss"] for line in steps(run)]
    assert losses[-1] < losses[0] - 1
    biases = [value for name, value in final_state(run).tensors["model"].items() if name.endswith("correction_bias")]
    assert len(biases) == 2
    for bias_E in biases:
        assert bias_E.dtype == torch.float32
        # A step moves by the rate up or down and takes the mean of E such moves off: whole parts of rate / E.
        moves_E = bias_E / (rate / len(bias_E))
        assert torch.equal(moves_E, moves_E.round())
        assert moves_E.any()


@pytest.mark.long
@pytest.mark.parametrize("stage, moments", [*product(SHARDED, ("float32", "bfloat16"))])
def test_moments_of_either_dtype(tmp_path: Path, stage: Stage, moments: str) -> None:
    config = write_config(tmp_path, train={"dtype": "bfloat16"}, optimizer={"moment_dtype": moments, **GENTLE})
    whole, killed, plain = (tmp_path / "runs" / name for name in ("whole", "killed", "plain"))
    train(config, whole, stage, 2)
    train_and_kill(config, killed, stage, 2, 9)
    train(config, killed, stage, 2)
    assert_same_bits(killed, whole)
    state = final_state(whole).tensors["optimizer"]
    dtypes = {tensor.dtype for name, tensor in state.items() if name.startswith("exp_avg") and "experts" in name}
    assert dtypes == {getattr(torch, moments)}
    train(config, plain, None, 1)
    losses = [[line["loss"] for line in steps(run)] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02), "numbers of 8 bits are rounded at every step"
