import copy
import itertools

import pytest
import torch
from torch import Tensor

from p828.config import OptimizerConfig
from p828.errors import ConfigError
from p828.model.init import initialise
from p828.model.transformer import Transformer
from p828.optim.adamw import AdamW, pick_moment_dtype
from p828.optim.clipping import global_norm, gradient_norms
from p828.optim.groups import parameter_groups
from p828.optim.interface import Optimizer
from p828.optim.masters import Masters
from tiny import joined, tiny_config

YES = torch.tensor(True)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16 = torch.float32, torch.bfloat16
KINDS = pytest.mark.parametrize(
    "dtype, moment_dtype", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=["float32", "split", "all-bfloat16"]
)


class Training:
    """A model, its gradients by name, and what updates it."""

    def __init__(self, dtype: torch.dtype = F32, moment_dtype: torch.dtype = F32, **options: bool) -> None:
        self.model = Transformer(tiny_config(use_qk_norm=True))
        initialise(self.model, 0)
        config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, **options)
        sums = {parameter: torch.zeros_like(parameter, requires_grad=False) for parameter in self.model.parameters()}
        self.gradients = {name: sums[parameter] for name, parameter in self.model.named_parameters()}
        self.masters = Masters(self.model, dtype)
        groups = parameter_groups(self.model, config, dtype)
        self.optimizer: Optimizer = AdamW(
            dict(self.model.named_parameters()), config, groups, self.masters.by_parameter, moment_dtype, sums
        )

    def weights(self) -> dict[str, Tensor]:
        """All in float32."""
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return {**own, **joined(self.masters)}

    def set_gradients(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for gradient in self.gradients.values():
            gradient.copy_(scale * torch.randn(gradient.shape, generator=generator))

    def update(self) -> None:
        self.optimizer.update(0.1, global_norm(gradient_norms(self.gradients.values())), YES)

    def step(self, seed: int, scale: float = 1.0) -> None:
        self.set_gradients(seed, scale)
        self.update()

    def load(self, other: "Training") -> None:
        saved = {**other.model.state_dict(), **joined(other.masters)}
        self.model.load_state_dict(saved)
        self.masters.load_state_dict(saved)
        self.optimizer.load_state_dict({name: value.clone() for name, value in other.optimizer.state_dict().items()})


@KINDS
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_matrices_decay_and_norms_sinks_and_embedding_do_not(
    dtype: torch.dtype, moment_dtype: torch.dtype, decay_embeddings: bool
) -> None:
    """What a step without gradients shrinks: decay is all that it does then."""
    training = Training(dtype, moment_dtype, decay_embeddings=decay_embeddings)
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            if name.endswith("sinks"):
                parameter += 1.0  # zeros would show nothing
    before = training.weights()
    training.step(seed=0, scale=0.0)
    after = training.weights()
    decayed = {name for name in before if not torch.equal(before[name], after[name])}
    assert decayed == {
        name
        for name, p in training.model.named_parameters()
        if p.ndim > 1 and (decay_embeddings or "embed" not in name)
    }
    for name in decayed:
        torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * 0.5))


@KINDS
@pytest.mark.parametrize("scale", [1e-4, 1.0], ids=["unclipped", "clipped"])
def test_a_step_is_torchs_clipping_and_adamw(dtype: torch.dtype, moment_dtype: torch.dtype, scale: float) -> None:
    training = Training(dtype, moment_dtype)
    twin = copy.deepcopy(training.model).float()
    twin.load_state_dict({**training.model.state_dict(), **joined(training.masters)})
    groups = [
        {
            "params": [p for n, p in twin.named_parameters() if (p.ndim > 1 and "embed" not in n) == decays],
            "weight_decay": 0.5 * decays,
        }
        for decays in (True, False)
    ]
    expected = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        training.set_gradients(seed, scale)
        for name, theirs in twin.named_parameters():
            theirs.grad = training.gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        torch.testing.assert_close(global_norm(gradient_norms(training.gradients.values())), norm)
        training.optimizer.update(0.1, norm, YES)
        expected.step()
    after = training.weights()
    # bfloat16 moments carry 2^-8 each, and three steps of at most the learning rate 0.1 depend on them.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if moment_dtype == F32 else {"rtol": 0.0, "atol": 3 * 0.1 * 2 * 2**-8}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(after[name], parameter.detach(), **tolerance, msg=name)


@KINDS
def test_saved_state_continues_bit_for_bit(dtype: torch.dtype, moment_dtype: torch.dtype) -> None:
    training, twin = Training(dtype, moment_dtype), Training(dtype, moment_dtype)
    training.step(1)
    twin.load(training)
    for seed in (2, 3):
        training.step(seed)
        twin.step(seed)
    theirs = twin.weights()
    for name, ours in training.weights().items():
        assert torch.equal(ours, theirs[name]), name
    for name, ours in training.optimizer.state_dict().items():
        assert torch.equal(ours, twin.optimizer.state_dict()[name]), name


@pytest.mark.parametrize("to", [(F32, F32), (BF16, F32), (BF16, BF16)])
@KINDS
def test_saved_state_continues_in_other_dtypes(
    dtype: torch.dtype, moment_dtype: torch.dtype, to: tuple[torch.dtype, torch.dtype]
) -> None:
    """Masters as they were, moments as near as their dtype allows, as many updates."""
    training, twin = Training(dtype, moment_dtype), Training(*to)
    for seed in range(3):
        training.step(seed)
    twin.load(training)
    assert all(torch.equal(value, twin.weights()[name]) for name, value in training.weights().items())
    found, before = twin.optimizer.state_dict(), training.optimizer.state_dict()
    assert found.keys() == before.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.float(), before[name].float(), rtol=2**-8, atol=0, msg=name)


@KINDS
def test_what_is_kept_in_which_dtype(dtype: torch.dtype, moment_dtype: torch.dtype) -> None:
    training = Training(dtype, moment_dtype)
    training.step(0)
    moments = training.optimizer.state_dict()
    for name, parameter in training.model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith("gate.weight")
        assert parameter.dtype == (dtype if is_matrix else F32)
        assert moments[f"exp_avg_sq/{name}"].dtype == (moment_dtype if is_matrix else F32)
        assert moments[f"step/{name}"].item() == 1
    assert all(value.dtype == F32 for value in joined(training.masters).values())


def test_moment_dtypes() -> None:
    assert pick_moment_dtype("auto", BF16, CUDA) == pick_moment_dtype("bfloat16", BF16, CPU) == BF16
    for wanted, dtype, device in (("auto", F32, CUDA), ("auto", BF16, CPU), ("float32", BF16, CUDA)):
        assert pick_moment_dtype(wanted, dtype, device) == F32
    with pytest.raises(ConfigError, match=r'optimizer.moment_dtype = "bfloat16": accepted in bfloat16 runs'):
        pick_moment_dtype("bfloat16", F32, CPU)


def test_equal_matrices_are_rounded_by_different_noise() -> None:
    training = Training(BF16, BF16)
    for _ in range(2):
        for gradient in training.gradients.values():
            gradient.fill_(1e-3)
        training.update()
    state = training.optimizer.state_dict()
    moments = [tensor for key, tensor in state.items() if "exp_avg/" in key and (".k_proj" in key or ".v_proj" in key)]
    assert len({tensor.shape for tensor in moments}) == 1
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(moments, 2))
