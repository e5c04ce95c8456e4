"""What one layer takes of a micro-batch on a GPU in bfloat16, in bytes: kept for the backward pass, and on the way.

The kernels say what they keep (`save_for_backward` in `kernels/`), and compiled code keeps the same: what its custom
operations and matrix products read again. Sizes have the suffixes of `model/__init__.py`: T tokens, H wide, N query and
G key heads of D, E experts of I (P before the activation), of which K a token, R rows of routed tokens in whole tiles.
"""

from dataclasses import dataclass
from typing import NamedTuple

from p828.config import Config
from p828.kernels.moe.tiles import TILE
from p828.model.costs import projected_width
from p828.plan.state import BFLOAT16, FLOAT32
from p828.plan.tensors import layer_shapes

INT64, INT32 = 8, 4


@dataclass(frozen=True)
class Sizes:
    """A micro-batch's, by the letters of `model/__init__.py`."""

    T: int
    H: int
    N: int
    G: int
    D: int
    E: int
    K: int
    I: int  # noqa: E741 (the legend's letter)
    P: int
    shared_I: int
    """Inner width of all shared experts together, and below their P."""
    shared_P: int

    @classmethod
    def of(cls, config: Config, micro_batch_size: int) -> "Sizes":
        model = config.model
        inner = model.moe_intermediate_size
        projected = projected_width(model.hidden_act, inner)
        return cls(
            T=micro_batch_size * config.data.sequence_length, H=model.hidden_size, N=model.num_attention_heads,
            G=model.num_key_value_heads, D=model.head_dim, E=model.n_routed_experts, K=model.num_experts_per_tok,
            I=inner, P=projected, shared_I=model.n_shared_experts * inner, shared_P=model.n_shared_experts * projected,
        )  # fmt: skip

    @property
    def R(self) -> int:
        """Rows of the routed tokens: no expert fills up more than a tile (`Experts.permutation`)."""
        return (-(-self.T * self.K // TILE) + self.E) * TILE

    @property
    def residual(self) -> int:
        """Bytes of one (T, H) tensor."""
        return BFLOAT16 * self.T * self.H

    @property
    def qkv(self) -> int:
        return BFLOAT16 * self.T * (self.N + 2 * self.G) * self.D

    @property
    def attended(self) -> int:
        """Attention's output and the log-sum-exps of its queries."""
        return BFLOAT16 * self.T * self.N * self.D + FLOAT32 * self.T * self.N

    @property
    def shared(self) -> int:
        """Gate and up projections of the shared experts."""
        return 2 * BFLOAT16 * self.T * self.shared_P

    @property
    def routed(self) -> int:
        """The first product of the routed experts."""
        return 2 * BFLOAT16 * self.R * self.P


class Kept(NamedTuple):
    """Bytes of one layer that wait for its backward pass."""

    residuals: int
    """Both sums of the residual stream and both normalised ones."""
    routing: int
    """Logits or scores, the choice, its weights, and the place of every routed token."""
    attention: int = 0
    """qkv with the weight that made it (the three joined), output and log-sum-exps."""
    shared: int = 0
    routed: int = 0


def kept(sizes: Sizes, recomputes: bool, has_auxiliary_losses: bool) -> Kept:
    """With recomputation (`train.gradient_checkpointing`) only what is read by the parts that are computed again."""
    routing = _routing(sizes, has_auxiliary_losses)
    if recomputes:
        return Kept(4 * sizes.residual, routing)
    joined_weight = BFLOAT16 * (sizes.N + 2 * sizes.G) * sizes.D * sizes.H
    return Kept(
        4 * sizes.residual, routing, sizes.qkv + sizes.attended + joined_weight, sizes.shared, sizes.routed
    )  # fmt: skip


def _routing(sizes: Sizes, has_auxiliary_losses: bool) -> int:
    logits = FLOAT32 * sizes.T * sizes.E
    choice = sizes.T * sizes.K * (INT64 + 2 * FLOAT32 + INT32)  # experts, their scores and weights, destinations
    places = INT32 * (sizes.R + sizes.R // TILE + sizes.E + 1)
    auxiliary = 2 * FLOAT32 * sizes.T * (sizes.E + 1) if has_auxiliary_losses else 0
    return logits + choice + places + auxiliary


def forward(sizes: Sizes) -> int:
    """Most that a layer's forward pass needs at once beside what it keeps: in the routed experts.

    Permuted tokens, activation and second product of R rows each, and the sum over a token's experts.
    """
    return BFLOAT16 * sizes.R * (2 * sizes.H + sizes.I) + sizes.residual


def backward(sizes: Sizes, kept: Kept, recomputes: bool) -> int:
    """Most that a layer's backward pass needs at once beside what the layer kept.

    `torch.compile` orders it so: routed experts, shared experts, attention; with recomputation the shared experts come
    first, and the two gradients of their input wait to be added. What a part kept is free behind it, and the gradients
    of its weights, bfloat16, are there until the backward pass of all layers ends.
    """
    incoming, gradient = sizes.residual, sizes.residual
    shared_gradients = BFLOAT16 * sizes.H * (sizes.shared_I + 2 * sizes.shared_P)
    routed_gradients = BFLOAT16 * sizes.E * sizes.H * (sizes.I + 2 * sizes.P)
    if recomputes:
        shared = incoming + sizes.shared + _shared_backward(sizes)
        before = incoming + 2 * gradient + shared_gradients + sizes.routed
        routed = before + max(forward(sizes), _routed_backward(sizes))
    else:
        routed = incoming + _routed_backward(sizes)
        shared = incoming + gradient + routed_gradients + _shared_backward(sizes) - kept.routed
    attention = incoming + 2 * gradient + shared_gradients + routed_gradients + _attention_backward(sizes)
    attention += sizes.qkv + sizes.attended if recomputes else -kept.shared - kept.routed
    return max(routed, shared, attention)


def _shared_backward(sizes: Sizes) -> int:
    """`swiglu_down_backward`: the activation's gradient, those of gate and up, and the down projection's."""
    return BFLOAT16 * (sizes.T * (sizes.shared_I + 2 * sizes.shared_P) + sizes.H * sizes.shared_I)


def _routed_backward(sizes: Sizes) -> int:
    """`routed_experts_backward`, at its first weight gradient, its tokens' gradient or its second weight gradient."""
    rows, gradients = BFLOAT16 * sizes.R, BFLOAT16 * sizes.E * sizes.H * sizes.I
    first = rows * (sizes.H + sizes.I + 2 * sizes.P) + gradients
    last = rows * (sizes.H + 2 * sizes.P) + gradients + sizes.residual + BFLOAT16 * sizes.E * 2 * sizes.P * sizes.H
    return max(first, last)


def _attention_backward(sizes: Sizes) -> int:
    """`attention_backward`: rotated queries and keys again, the gradients of all three, and that of qkv."""
    heads = (sizes.N + sizes.G) + (sizes.N + 2 * sizes.G) + (sizes.N + 2 * sizes.G)
    return BFLOAT16 * sizes.T * sizes.D * heads + FLOAT32 * sizes.T * sizes.N


def weight_gradients(config: Config) -> int:
    """Gradients of one layer's weights from one micro-batch, each in its parameter's dtype."""
    return sum(one.numbers * (BFLOAT16 if one.is_matrix else FLOAT32) for one in layer_shapes(config.model))
