"""A step of a single sequence on a CPU in float32, where a small model's calls take longer than what they compute.

So NumPy makes most of them, in a third to a half of PyTorch's time. Large products, attention and the experts'
activation are PyTorch's, in the same memory. X counts query and key heads, J a token's experts with the shared ones,
Y = D / 2.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p828.config import ModelConfig
from p828.inference.decode.cpu_layers import CpuLayer
from p828.kernels.decode import cpu
from p828.kernels.decode.cpu import Matrix, Norm
from p828.kernels.decode.float16_cpu import Float16Matrix
from p828.model.costs import projected_width
from p828.model.experts import activate

Floats = NDArray[np.float32]


class TokenStep:
    """All layers for one token, in buffers that are made once, with their views."""

    def __init__(
        self,
        layers: list[CpuLayer],
        norm: Norm,
        config: ModelConfig,
        cos_C1D: Tensor,
        sin_C1D: Tensor,
    ) -> None:
        self.layers, self.norm, self.config = layers, norm, config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        half = config.head_dim // 2
        self.cos_C2Y, self.sin_C2Y = (table.numpy().reshape(-1, 2, half) for table in (cos_C1D, sin_C1D))
        self.rotated_XD = torch.empty(self.heads + self.groups, config.head_dim)
        self.q_GMD = self.rotated_XD[: self.heads].view(self.groups, -1, config.head_dim)
        self.rotated_X2Y = self.rotated_XD.numpy().reshape(-1, 2, half)
        self.k_GD = self.rotated_XD[self.heads :].numpy()
        self.nothing_hidden = torch.zeros(1, 1, 1)
        experts = config.num_experts_per_tok + len(layers[0].shared)
        gate_up_JX = torch.empty(experts, 2 * projected_width(config.hidden_act, config.moe_intermediate_size))
        self.gate_up_JX, (self.gate_JP, self.up_JP) = gate_up_JX.numpy(), gate_up_JX.chunk(2, dim=1)

    @np.errstate(over="ignore", invalid="ignore")  # of a model that has diverged, which its logits tell of
    def hidden(self, embedding_1H: Tensor, slot: int, position: int) -> tuple[Tensor, list[Tensor]]:
        """What the head multiplies, (1, H), and each layer's routed experts, int64 (1, K)."""
        x_H = embedding_1H.numpy()[0]
        experts_LTK = []
        for layer in self.layers:
            self._add_attention_(x_H, layer, slot, position)
            experts_LTK.append(self._add_experts_(x_H, layer))
        return torch.from_numpy(normed(self.norm, x_H))[None], experts_LTK

    def _add_attention_(self, x_H: Floats, layer: CpuLayer, slot: int, position: int) -> None:
        qkv_XD = product(layer.qkv, normed(layer.input_norm, x_H)).reshape(-1, self.config.head_dim)
        qk_XD = qkv_XD[: -self.groups]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk_XD[: self.heads] = normed(layer.q_norm, qk_XD[: self.heads])
            qk_XD[self.heads :] = normed(layer.k_norm, qk_XD[self.heads :])
        qk_X2Y = qk_XD.reshape(self.rotated_X2Y.shape)
        np.multiply(qk_X2Y, self.cos_C2Y[position], out=self.rotated_X2Y)
        self.rotated_X2Y += qk_X2Y[:, ::-1] * self.sin_C2Y[position]
        layer.cache.numpy_keys[slot, :, position] = self.k_GD
        layer.cache.numpy_values[slot, :, position] = qkv_XD[-self.groups :]
        out_GMD = cpu.attend(self.q_GMD, *layer.cache.of_one(slot, position), layer.sinks_GM1, self.nothing_hidden)
        x_H += product(layer.o_proj, out_GMD.numpy().reshape(-1))

    def _add_experts_(self, x_H: Floats, layer: CpuLayer) -> Tensor:
        normed_H = normed(layer.post_norm, x_H)
        experts_K, weights_K = routed(self.config, product(layer.router, normed_H), layer.numpy_bias_E)
        experts = [layer.routed[number] for number in experts_K.tolist()] + layer.shared
        weights = weights_K.tolist() + [1.0] * len(layer.shared)
        for expert, gate_up_X in zip(experts, self.gate_up_JX, strict=True):
            gate_up_X[:] = product(expert.gate_up, normed_H)
        inner_JI = activate(self.config.hidden_act, self.gate_JP, self.up_JP).numpy()
        for expert, inner_I, weight in zip(experts, inner_JI, weights, strict=True):
            x_H += weight * product(expert.down, inner_I)
        return torch.from_numpy(experts_K)[None]


def routed(config: ModelConfig, logits_E: Floats, bias_E: Floats) -> tuple[NDArray[np.int64], Floats]:
    """A token's experts (K,), the best first, and their weights, as `p828.model.router.routing_of` has them.

    Of experts with equal scores others may be chosen. One whose score is NaN comes first, as there.
    """
    if config.scoring_func == "softmax":
        scores_E = np.exp(logits_E - logits_E.max())
        scores_E /= scores_E.sum()
    else:
        scores_E = 1 / (1 + np.exp(-logits_E))
    choice_E = scores_E + bias_E
    if config.n_group > 1:
        choice_GX = choice_E.reshape(config.n_group, -1)  # here G counts groups of X experts each
        best_two_G = np.partition(choice_GX, -2)[:, -2:].sum(axis=1)
        choice_GX[np.argsort(best_two_G)[: -config.topk_group]] = -np.inf
    experts_K = np.argsort(choice_E)[: -config.num_experts_per_tok - 1 : -1].copy()
    weights_K = scores_E[experts_K]
    if config.norm_topk_prob:
        weights_K = weights_K / max(weights_K.sum(), 1e-20)
    return experts_K, weights_K * config.routed_scaling_factor


def product(matrix: Matrix | Float16Matrix, x_H: Floats) -> Floats:
    """weight x: (V,)."""
    if isinstance(matrix, Float16Matrix) or matrix.is_large:
        return matrix(torch.from_numpy(x_H)[None]).numpy()[0]
    return matrix.numpy_VH.dot(x_H)


def normed(norm: Norm, x: Floats) -> Floats:
    """RMSNorm of a vector, or of each row of a matrix."""
    squares = float(x.dot(x)) if x.ndim == 1 else np.square(x).sum(axis=1, keepdims=True)
    return x * (squares / x.shape[-1] + norm.eps) ** -0.5 * norm.numpy_H
