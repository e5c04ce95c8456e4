"""The bytes that training takes, known from shapes alone, beside the tensors of an engine."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from p828.engine.plain import PlainEngine
from p828.model.transformer import Transformer
from p828.optim.groups import Group, GroupBytes, group_bytes, parameter_groups
from runs import run_config


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def bytes_in(engine: PlainEngine, group: Group, groups: dict[str, Group]) -> GroupBytes:
    """What the engine holds for the parameters of a group."""
    parameters = {name: p for name, p in engine.model.named_parameters() if groups[name] == group}
    masters, state = engine.masters.state_dict(), engine.optimizer.state_dict()
    return GroupBytes(
        weights=bytes_of([parameter.data for parameter in parameters.values()]),
        low_bits=bytes_of([masters[name].low_bits for name in parameters if name in masters]),
        gradients=bytes_of([engine.gradients.sums[parameter] for parameter in parameters.values()]),
        moments=bytes_of([state[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq") for name in parameters]),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, moments", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_bytes_of_each_group_are_those_of_an_engine(tmp_path: Path, dtype: str, moments: str, tied: bool) -> None:
    config = run_config(
        tmp_path,
        model={"tie_word_embeddings": tied, "use_qk_norm": True},
        optimizer={"moment_dtype": moments},
        train={"dtype": dtype},
    )
    with torch.device("meta"):
        model = Transformer(config.model)
    groups = parameter_groups(model, config.optimizer, getattr(torch, dtype))
    told = group_bytes(model, groups, getattr(torch, moments))
    engine = PlainEngine(config)
    assert groups.keys() == dict(engine.model.named_parameters()).keys()
    assert told == {group: bytes_in(engine, group, groups) for group in told}
    numbers = sum(parameter.numel() for parameter in engine.model.parameters())
    assert sum(group.gradients for group in told.values()) == 4 * numbers


def test_groups_of_a_bfloat16_run(tmp_path: Path) -> None:
    """By hand: what each kind of parameter is stored as, and whether it decays."""
    config = run_config(tmp_path)
    with torch.device("meta"):
        groups = parameter_groups(Transformer(config.model), config.optimizer, torch.bfloat16)
    layer = "model.layers.1"
    assert groups["model.embed_tokens.weight"] == Group(decays=False, is_split=True, is_embedding=True)
    assert groups["lm_head.weight"] == Group(decays=True, is_split=True, is_embedding=False)
    assert groups[f"{layer}.mlp.experts.down_proj"] == Group(decays=True, is_split=True, is_embedding=False)
    assert groups[f"{layer}.mlp.gate.weight"] == Group(decays=True, is_split=False, is_embedding=False)
    assert groups[f"{layer}.input_layernorm.weight"] == Group(decays=False, is_split=False, is_embedding=False)
