"""An update rule that p828 does not have, in the place of AdamW: it needs nothing but what `Optimizer` names."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p828.data.batch import Batch
from p828.engine.plain import PlainEngine
from p828.kernels.adamw import join_float32, split_float32
from p828.optim.clipping import clip_factor
from p828.optim.interface import Optimizer
from p828.optim.masters import Masters
from p828.runs.tensors import Master, tensors_of
from runs import run_config

RATE = 2.0**-8


class SignDescent:
    """signSGD with momentum (arXiv 1802.04434): every number moves by the learning rate."""

    state_keys = ("momentum",)

    def __init__(self, parameters: Mapping[str, Tensor], masters: Masters, sums: Mapping[Tensor, Tensor]) -> None:
        self.parameters, self.masters, self.sums = parameters, masters.state_dict(), sums
        self.momentum = {name: torch.zeros_like(sums[parameter]) for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, learning_rate: float, norm: Tensor, applied: Tensor) -> None:
        clip = clip_factor(norm, 1.0)
        for name, parameter in self.parameters.items():
            momentum = self.momentum[name].lerp(self.sums[parameter] * clip, 0.1)
            self.momentum[name].copy_(torch.where(applied, momentum, self.momentum[name]))
            step = torch.where(applied, learning_rate * momentum.sign(), 0.0)
            if name in self.masters:
                master = self.masters[name]
                for kept, new in zip(master, split_float32(join_float32(*master) - step), strict=True):
                    kept.copy_(new)
            else:
                parameter -= step

    def state_dict(self) -> dict[str, Tensor]:
        return {f"momentum/{name}": momentum for name, momentum in self.momentum.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        for name, momentum in self.momentum.items():
            momentum.copy_(tensors[f"momentum/{name}"])


def make_engine(tmp_path: Path, dtype: str) -> PlainEngine:
    engine = PlainEngine(run_config(tmp_path, train={"dtype": dtype}))
    optimizer: Optimizer = SignDescent(dict(engine.model.named_parameters()), engine.masters, engine.gradients.sums)
    engine.optimizer = optimizer
    return engine


def train(engine: PlainEngine, steps: int) -> list[float]:
    """Losses of steps on one batch."""
    tokens = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(2, -1).contiguous()
    documents = torch.zeros_like(positions, dtype=torch.int32)
    losses = []
    for _ in range(steps):
        engine.forward_backward(Batch(tokens[:, :-1], tokens[:, 1:].clone(), positions, documents, 64), 64)
        losses.append(engine.step(RATE).loss)
    return losses


def whole(engine: PlainEngine) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of it holds."""
    return {
        part: {
            name: join_float32(*value) if isinstance(value, Master) else tensors_of(value)[0].clone()
            for name, value in values.items()
        }
        for part, values in engine.state_dict().items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_update_rule_learns_and_goes_on_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    engine = make_engine(tmp_path, dtype)
    before = whole(engine)["model"]
    losses = train(engine, 1)
    saved = whole(engine)
    moves = saved["model"]["lm_head.weight"] - before["lm_head.weight"]
    # float32 numbers of at most some tenths: the difference carries some units of 2^-24 of them
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, RATE), rtol=0, atol=1e-7)
    losses += train(engine, 24)
    assert losses[-1] < 0.5 * losses[0]
    other = make_engine(tmp_path, dtype)
    other.load_state_dict(saved)
    assert train(other, 24) == losses[1:]
    theirs = whole(engine)
    for part, tensors in whole(other).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[part][name]), name
