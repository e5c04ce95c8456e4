"""The plan's bytes of the sharded engine beside the tensors that a real one has, and the stage that follows."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from p828.config import ShardedConfig
from p828.distributed.group import joined
from p828.engine.sharded.engine import ShardedEngine
from p828.plan.sharded import STAGES, lowest_stage, sharded_state, sharded_total
from p828.plan.state import State
from runs import run_config


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the memory under them, counted once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())


def state_of(engine: ShardedEngine) -> State:
    gradients = engine.gradients
    buffers = [tensor for buffer in gradients._buffers for tensor in buffer]
    moments = [value for name, value in engine.optimizer.state_dict().items() if name.startswith("exp_avg")]
    small = [parameter for name, parameter in engine.model.named_parameters() if name in gradients.small]
    low_bits = [tensor for tensor in engine.state.low_bits if tensor is not None]
    return State(
        bytes_of([*engine.weights.flats, *engine.weights.shards, *small]),
        bytes_of(low_bits),
        bytes_of([*gradients.shards, *gradients.places.values(), *gradients.small.values(), *buffers]),
        bytes_of(moments),
    )


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_real_engine_has_these_bytes(tmp_path: Path, is_tied: bool) -> None:
    model = {"num_hidden_layers": 3, "hidden_size": 64, "tie_word_embeddings": is_tied}
    config = run_config(tmp_path, model=model, train={"dtype": "bfloat16"}, optimizer={"moment_dtype": "bfloat16"})
    config = replace(config, engine="sharded")
    with joined(config) as ranks:
        for stage in STAGES:
            found = state_of(ShardedEngine(replace(config, sharded=ShardedConfig(stage=stage)), ranks))
            expected = sharded_state(config, stage, 1)
            for part, ours, theirs in zip(State._fields, expected, found, strict=True):
                assert ours == pytest.approx(theirs, rel=0.01), (stage, part)


def test_the_lowest_stage_that_fits(tmp_path: Path) -> None:
    config = run_config(tmp_path, model={"num_hidden_layers": 12, "hidden_size": 1024, "moe_intermediate_size": 2048})
    totals = [sharded_total(config, stage, 8) for stage in STAGES]
    assert totals == sorted(totals, reverse=True)
    for stage, total in zip(STAGES, totals, strict=True):
        assert lowest_stage(config, 8, total) == stage
    assert lowest_stage(config, 8, totals[-1] - 1) is None
