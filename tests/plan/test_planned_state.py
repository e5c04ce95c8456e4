"""Parameters and the bytes of what is kept of them, beside real models and engines."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from p828.config import OptimizerConfig
from p828.engine.plain import PlainEngine
from p828.engine.sharded import units, weights
from p828.model.precision import is_matrix
from p828.model.transformer import Transformer
from p828.optim.groups import parameter_groups
from p828.plan.setup import Setup
from p828.plan.state import numbers_of_deepspeed, training_state
from p828.plan.tensors import parameter_shapes
from p828.plan.units import ALIGNMENT, BUFFERS, units_of
from runs import run_config
from tiny import tiny_config

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied, q/k norm, no sinks": {"tie_word_embeddings": True, "use_qk_norm": True, "attention_sinks": False},
    "no shared": {"n_shared_experts": 0, "num_hidden_layers": 3},
    "two shared, product": {"n_shared_experts": 2, "hidden_act": "swiglu_of_product", "head_dim": 24},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_the_model_s(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    with torch.device("meta"):
        model = Transformer(config)
    found = {one.name: one for one in parameter_shapes(config)}
    assert {name: one.shape for name, one in found.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert list(found) == [name for name, _ in model.named_parameters()] or config.tie_word_embeddings
    for decay_embeddings in (False, True):
        optimizer = OptimizerConfig(decay_embeddings=decay_embeddings)
        groups = parameter_groups(model, optimizer, torch.bfloat16)
        assert {name: one.decays(decay_embeddings) for name, one in found.items()} == {
            name: group.decays for name, group in groups.items()
        }
        assert {n: one.is_matrix for n, one in found.items()} == {
            n: is_matrix(n, p.ndim) for n, p in model.named_parameters()
        }


@pytest.mark.parametrize("dtype, moments", [("float32", "auto"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_plain_engine_keeps_what_is_planned(tmp_path: Path, dtype: str, moments: str, is_tied: bool) -> None:
    config = run_config(
        tmp_path, train={"dtype": dtype}, optimizer={"moment_dtype": moments},
        model={"tie_word_embeddings": is_tied, "use_qk_norm": True},
    )  # fmt: skip
    engine = PlainEngine(config)
    state = {name: tensor for name, tensor in engine.optimizer.state_dict().items() if not name.startswith("step/")}
    setup = Setup(is_bfloat16=dtype == "bfloat16", has_bfloat16_moments=moments == "bfloat16")
    planned = training_state(config.model, config.optimizer, setup)
    assert planned.weights == sum(parameter.nbytes for parameter in engine.model.parameters())
    assert planned.masters == sum(master.low_bits.nbytes for master in engine.masters.by_parameter.values())
    assert planned.gradients == sum(total.nbytes for total in engine.gradients.sums.values())
    assert planned.moments == sum(tensor.nbytes for tensor in state.values())
    assert planned.total == sum(planned)


def test_the_ranks_parts_add_up_to_the_whole() -> None:
    """Whatever fills them up to equal shares is less than a share's alignment for each that is filled up."""
    config, optimizer = tiny_config(), OptimizerConfig()
    parameters = parameter_shapes(config)
    whole = sum(one.numbers for one in parameters)
    for ranks in (1, 2, 3, 8):
        assert numbers_of_deepspeed(parameters, optimizer, 0, ranks) == whole
        assert 0 <= numbers_of_deepspeed(parameters, optimizer, 1, ranks) - whole < 2 * 2 * ranks
        assert 0 <= numbers_of_deepspeed(parameters, optimizer, 3, ranks) - whole < len(parameters) * ranks
        states = [training_state(config, optimizer, Setup(stage, ranks)) for stage in range(4)]
        assert [state.total for state in states] == sorted((state.total for state in states), reverse=True)
        sharded = [training_state(config, optimizer, Setup(stage, ranks, is_sharded=True)) for stage in (1, 2, 3)]
        assert [state.total for state in sharded] == sorted((state.total for state in sharded), reverse=True)
        cut = units_of(parameters, ranks)
        filled_up = cut.total + cut.small - whole
        assert 0 <= filled_up < ALIGNMENT * (len(parameters) + ranks * (len(cut.layers) + len(cut.ends)))
    for stage in (1, 2, 3):  # of two hosts that each have a replica, one alone
        alone = Setup(stage, 3, is_sharded=True)
        replicated = alone._replace(ranks=6, hosts=2, shards_within_hosts=True)
        assert training_state(config, optimizer, replicated) == training_state(config, optimizer, alone)
    offloaded = training_state(config, optimizer, Setup(3, 2, offload_optimizer=True, offload_param=True))
    assert offloaded.total == 0
    assert dataclasses.asdict(optimizer)["decay_embeddings"] is False


def test_units_are_the_engine_s() -> None:
    assert (ALIGNMENT, BUFFERS) == (units.ALIGNMENT, weights.BUFFERS)
    for ranks in (1, 2, 3):
        for changes in ({}, {"tie_word_embeddings": True}, {"n_shared_experts": 0, "head_dim": 24}):
            config = tiny_config(**changes)
            with torch.device("meta"):
                found = units.units_of(Transformer(config), ranks)
            planned = units_of(parameter_shapes(config), ranks)
            assert planned.layers == tuple(unit.length for unit in found if unit.layer is not None)
            assert planned.ends == tuple(unit.length for unit in found if unit.layer is None)
