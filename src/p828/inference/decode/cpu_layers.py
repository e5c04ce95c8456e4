"""A layer of a decoding step on a CPU in float32, for several sequences. Weights may be held in less.

T counts the sequences of a step, J the experts of a layer with the shared ones, C tokens of the cache, M query heads of
a key head, X the key heads of all sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.inference.decode.weights import LayerWeights
from p828.kernels.decode import cpu
from p828.kernels.decode.cpu import Matrix, Norm, matrix_of
from p828.kernels.decode.float16_cpu import Float16Matrix
from p828.model.experts import activate
from p828.model.router import Routing, routing_of

TOGETHER = 2**18
"""Numbers of a layer's experts up to which several tokens go through all of them: 1 MB, a core's second cache."""


class Places(NamedTuple):
    """Where the newest tokens of a step's sequences lie, and what they see; the same in all layers."""

    slots: list[int]
    positions: list[int]
    rows_X: Tensor
    """int64: the rows of a layer's cache that they are written to."""
    cos_T1D: Tensor
    sin_T1D: Tensor
    mask_X1C: Tensor | None
    """float32: minus infinity past a sequence's newest token, where their slots lie side by side; else None."""


class LayerCache:
    """A layer's keys and values."""

    def __init__(self, keys_SGCD: Tensor, values_SGCD: Tensor) -> None:
        self.groups, self.head_dim = keys_SGCD.shape[1], keys_SGCD.shape[-1]
        self.keys_XCD, self.values_XCD = (whole.flatten(0, 1) for whole in (keys_SGCD, values_SGCD))
        self.slot_keys, self.slot_values = keys_SGCD.unbind(), values_SGCD.unbind()
        self.numpy_keys, self.numpy_values = keys_SGCD.numpy(), values_SGCD.numpy()

    def store(self, rows_X: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> None:
        self.keys_XCD.view(-1, self.head_dim).index_copy_(0, rows_X, k_TGD.reshape(-1, self.head_dim))
        self.values_XCD.view(-1, self.head_dim).index_copy_(0, rows_X, v_TGD.reshape(-1, self.head_dim))

    def of_one(self, slot: int, position: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a slot up to a position: (G, C, D) each."""
        return self.slot_keys[slot].narrow(1, 0, position + 1), self.slot_values[slot].narrow(1, 0, position + 1)

    def of_several(self, slot: int, count: int, position: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `count` slots from `slot` on, up to a position: (X, C, D) each."""
        first, last = slot * self.groups, (slot + count) * self.groups
        return self.keys_XCD[first:last, : position + 1], self.values_XCD[first:last, : position + 1]


class Expert(NamedTuple):
    gate_up: Matrix | Float16Matrix
    """(2 P, H), the gate's rows first."""
    down: Matrix | Float16Matrix


class SmallExperts:
    """All experts of a layer in two matrices: a few operations, where each chosen expert would take a dozen."""

    def __init__(self, gate_up_JPH: Tensor, down_JHI: Tensor) -> None:
        self.count = len(gate_up_JPH)
        self.gate_up = matrix_of(gate_up_JPH.flatten(0, 1))
        self.down = matrix_of(down_JHI.transpose(0, 1).flatten(1))

    def add_(self, x_TH: Tensor, normed_TH: Tensor, routing: Routing, hidden_act: str) -> None:
        """Each token goes through all experts; weight 0 leaves one out."""
        gate_up_TJP = self.gate_up(normed_TH).unflatten(1, (self.count, -1))
        routed = routing.scores_TE.shape[1]
        weights_TJ = torch.zeros(x_TH.shape[0], self.count).scatter_(1, routing.experts_TK, routing.weights_TK)
        weights_TJ[:, routed:] = 1.0
        inner_TJI = activate(hidden_act, *gate_up_TJP.chunk(2, dim=2)).mul_(weights_TJ[..., None])
        self.down.add_product_(x_TH, inner_TJI.flatten(1))


class CpuLayer:
    """A layer's weights, cut and turned once."""

    def __init__(self, weights: LayerWeights, config: ModelConfig, cache: LayerCache) -> None:
        self.config, self.cache = config, cache
        eps = config.rms_norm_eps
        self.input_norm, self.post_norm = Norm(weights.input_norm_H, eps), Norm(weights.post_norm_H, eps)
        self.qkv, self.o_proj = matrix_of(weights.qkv_XH), matrix_of(weights.o_proj_HX)
        self.q_norm = None if weights.q_norm_D is None else Norm(weights.q_norm_D, eps)
        self.k_norm = None if weights.k_norm_D is None else Norm(weights.k_norm_D, eps)
        self.sinks_GM1 = None if weights.sinks_N is None else weights.sinks_N.view(cache.groups, -1, 1)
        self.router, self.bias_E = matrix_of(weights.router_EH), weights.bias_E
        self.numpy_bias_E = weights.bias_E.numpy()
        gate_up, down = [weights.gate_up_EPH], [weights.down_EHI]
        if weights.shared_gate_up_SPH is not None and weights.shared_down_SHI is not None:
            gate_up.append(weights.shared_gate_up_SPH)
            down.append(weights.shared_down_SHI)
        experts = [
            Expert(matrix_of(gate_up_PH), matrix_of(down_HI))
            for gate_up_XPH, down_XHI in zip(gate_up, down, strict=True)
            for gate_up_PH, down_HI in zip(gate_up_XPH, down_XHI, strict=True)
        ]
        self.routed, self.shared = experts[: config.n_routed_experts], experts[config.n_routed_experts :]
        is_small = sum(matrix.numel() for matrix in gate_up + down) <= TOGETHER
        self.small_experts = SmallExperts(torch.cat(gate_up), torch.cat(down)) if is_small else None

    def add_(self, x_TH: Tensor, places: Places) -> Tensor:
        """Put keys and values into the cache and the outputs onto the residual stream; returns the experts, (T, K)."""
        self._add_attention_(x_TH, places)
        normed_TH = self.post_norm(x_TH)
        routing = routing_of(self.config, self.router(normed_TH), self.bias_E)
        if self.small_experts is not None:
            self.small_experts.add_(x_TH, normed_TH, routing, self.config.hidden_act)
        else:
            self._add_experts_(x_TH, normed_TH, routing)
        return routing.experts_TK

    def _add_attention_(self, x_TH: Tensor, places: Places) -> None:
        tokens, groups, head_dim = len(places.slots), self.cache.groups, self.cache.head_dim
        qkv_TXD = self.qkv(self.input_norm(x_TH)).unflatten(1, (-1, head_dim))
        qk_TXD, v_TGD = qkv_TXD[:, :-groups], qkv_TXD[:, -groups:]
        if self.q_norm is not None and self.k_norm is not None:
            qk_TXD = torch.cat((self.q_norm(qk_TXD[:, :-groups]), self.k_norm(qk_TXD[:, -groups:])), dim=1)
        qk_TXD = cpu.rotate(qk_TXD, places.cos_T1D, places.sin_T1D)
        self.cache.store(places.rows_X, qk_TXD[:, -groups:], v_TGD)
        q_XMD = qk_TXD[:, :-groups].reshape(tokens * groups, -1, head_dim)
        self.o_proj.add_product_(x_TH, self._attended(q_XMD, places).view(tokens, -1))

    def _attended(self, q_XMD: Tensor, places: Places) -> Tensor:
        """Attention over each sequence's slot: of slots side by side in one call, else of one after the other."""
        sinks_GM1 = self.sinks_GM1
        if places.mask_X1C is not None:
            count = len(places.slots)
            keys_XCD, values_XCD = self.cache.of_several(places.slots[0], count, max(places.positions))
            sinks_XM1 = None if sinks_GM1 is None else sinks_GM1.repeat(count, 1, 1)
            return cpu.attend(q_XMD, keys_XCD, values_XCD, sinks_XM1, places.mask_X1C)
        nothing_hidden = torch.zeros(1, 1, 1)
        outs = [
            cpu.attend(q_GMD, *self.cache.of_one(slot, position), sinks_GM1, nothing_hidden)
            for q_GMD, slot, position in zip(
                q_XMD.split(self.cache.groups), places.slots, places.positions, strict=True
            )
        ]
        return torch.cat(outs)

    def _add_experts_(self, x_TH: Tensor, normed_TH: Tensor, routing: Routing) -> None:
        """Of the routed experts, those are read that some token goes to."""
        for expert in self.shared:
            expert.down.add_product_(x_TH, self._inner(expert, normed_TH))
        tokens_of: dict[int, list[int]] = {}
        weights_of: dict[int, list[list[float]]] = {}
        for token, row in enumerate(zip(routing.experts_TK.tolist(), routing.weights_TK.tolist(), strict=True)):
            for number, weight in zip(*row, strict=True):
                tokens_of.setdefault(number, []).append(token)
                weights_of.setdefault(number, []).append([weight])
        for number, tokens in tokens_of.items():
            token_X, expert = torch.tensor(tokens), self.routed[number]
            inner_XI = self._inner(expert, normed_TH[token_X]).mul_(torch.tensor(weights_of[number]))
            x_TH.index_add_(0, token_X, expert.down(inner_XI))

    def _inner(self, expert: Expert, x_TH: Tensor) -> Tensor:
        return activate(self.config.hidden_act, *expert.gate_up(x_TH).chunk(2, dim=1))
