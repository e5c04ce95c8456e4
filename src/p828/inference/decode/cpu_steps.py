"""Steps on a CPU: the host knows tokens, places and experts as it goes, and starts few operations for each.

T counts the sequences of a step, J the experts of a token, C tokens of the cache, M query heads of a key head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.inference.decode.cache import SlotCache
from p828.inference.decode.rows import Rows, drawing_of
from p828.inference.decode.sequence import DecodedSequence
from p828.inference.decode.steps import Flight, PlainSteps
from p828.inference.decode.weights import LayerWeights, decode_weights
from p828.kernels.decode import cpu
from p828.kernels.decode.cpu import Matrix, Norm
from p828.model.experts import activate
from p828.model.rope import rotary
from p828.model.router import routing_of
from p828.model.transformer import Transformer


class Places(NamedTuple):
    """Where the newest tokens of a step's sequences lie, and what they see; the same in all layers."""

    slots: list[int]
    positions: list[int]
    rows_X: Tensor
    """int64 (T · G): the rows of a layer's flattened cache that they are written to."""
    cos_T1D: Tensor
    sin_T1D: Tensor
    mask_T1MC: Tensor | None
    """float32: minus infinity past a sequence's newest token, where their slots lie side by side; else None."""


class Expert(NamedTuple):
    gate_up: Matrix
    """(2 P, H), the gate's rows first."""
    down: Matrix

    def add_(self, out_TH: Tensor, x_TH: Tensor, hidden_act: str, factor: float) -> None:
        """Add factor · down(act(gate x, up x)) to `out_TH`."""
        inner_TI = activate(hidden_act, *self.gate_up(x_TH).chunk(2, dim=1))
        self.down.add_product_(out_TH, inner_TI, factor)


class CpuLayer(NamedTuple):
    """A layer's weights, cut and turned once."""

    input_norm: Norm
    qkv: Matrix
    q_norm: Norm | None
    k_norm: Norm | None
    sinks_GM: Tensor | None
    o_proj: Matrix
    post_norm: Norm
    router_HE: Tensor
    bias_E: Tensor
    routed: list[Expert]
    shared: list[Expert]


class CpuSteps(PlainSteps):
    """float32 on a CPU."""

    def __init__(self, model: Transformer, cache: SlotCache, rows: Rows, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__(model, cache, rows, vocab_size, dtype)
        self.config: ModelConfig = model.config
        weights = decode_weights(model, vocab_size, dtype)
        self.embedding_VH, self.head = weights.embedding_VH, Matrix(weights.head_VH)
        self.norm = Norm(weights.norm_H, self.config.rms_norm_eps)
        self.layers = [_prepared(layer, self.config) for layer in weights.layers]
        positions_1C = torch.arange(cache.max_length)[None]
        angles = rotary(positions_1C, model.frequencies, self.config.rope_scaling.factor)
        cos_C1X, sin_C1X = (angle.squeeze(0) for angle in angles)
        self.cos_C1D = torch.cat((cos_C1X, cos_C1X), dim=-1)
        self.sin_C1D = torch.cat((-sin_C1X, sin_C1X), dim=-1)
        self.sharing = self.config.num_attention_heads // self.config.num_key_value_heads

    @torch.inference_mode()
    def continue_(self, sequences: Sequence[DecodedSequence], lengths: Sequence[int]) -> Flight:
        slots = [sequence.slot for sequence in sequences]
        slots_T = torch.tensor(slots)
        places = self._places(slots, self.rows.position_S[slots_T])
        x_TH = self.embedding_VH[self.rows.token_S[slots_T]]
        wants_experts = any(sequence.wants.experts for sequence in sequences)
        chosen = []
        for index, layer in enumerate(self.layers):
            self._add_attention_(x_TH, index, layer, places)
            experts_TK = self._add_experts_(x_TH, layer)
            chosen += [experts_TK] if wants_experts else []
        logits_TV = self.head(self.norm(x_TH))
        token_T = self.rows.choose(logits_TV, slots_T, drawing_of(sequences))
        return self.flight(sequences, token_T, logits_TV, torch.stack(chosen) if chosen else None)

    def _places(self, slots: list[int], position_T: Tensor) -> Places:
        groups, context = self.config.num_key_value_heads, self.cache.max_length
        positions = position_T.tolist()
        rows = [
            (slot * groups + group) * context + position
            for slot, position in zip(slots, positions, strict=True)
            for group in range(groups)
        ]
        mask_T1MC = None
        if len(slots) > 1 and slots == list(range(slots[0], slots[0] + len(slots))):
            hidden_TC = torch.arange(max(positions) + 1) > position_T[:, None]
            mask_TC = torch.zeros(hidden_TC.shape).masked_fill_(hidden_TC, float("-inf"))
            mask_T1MC = mask_TC[:, None, None].expand(-1, 1, self.sharing, -1)
        at = position_T if len(slots) > 1 else slice(positions[0], positions[0] + 1)
        cos_T1D, sin_T1D = self.cos_C1D[at], self.sin_C1D[at]
        return Places(slots, positions, torch.tensor(rows), cos_T1D, sin_T1D, mask_T1MC)

    def _add_attention_(self, x_TH: Tensor, index: int, layer: CpuLayer, places: Places) -> None:
        config = self.config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv_TX = layer.qkv(layer.input_norm(x_TH)).contiguous()  # attention's kernel reads a head as numbers in a row
        qkv_TXD = qkv_TX.view(-1, heads + 2 * groups, head_dim)
        qk_TXD, v_TGD = qkv_TXD[:, : heads + groups], qkv_TXD[:, heads + groups :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q_TND, k_TGD = qk_TXD.split((heads, groups), dim=1)
            qk_TXD = torch.cat((layer.q_norm(q_TND), layer.k_norm(k_TGD)), dim=1)
        qk_TXD = cpu.rotate(qk_TXD, places.cos_T1D, places.sin_T1D)
        keys_SGCD, values_SGCD = self.cache.keys[index], self.cache.values[index]
        keys_SGCD.view(-1, head_dim).index_copy_(0, places.rows_X, qk_TXD[:, heads:].reshape(-1, head_dim))
        values_SGCD.view(-1, head_dim).index_copy_(0, places.rows_X, v_TGD.reshape(-1, head_dim))
        q_TGMD = qk_TXD[:, :heads].reshape(-1, groups, self.sharing, head_dim)
        out_TGMD = _attended(q_TGMD, keys_SGCD, values_SGCD, layer.sinks_GM, places)
        layer.o_proj.add_product_(x_TH, out_TGMD.reshape(-1, heads * head_dim), 1.0)

    def _add_experts_(self, x_TH: Tensor, layer: CpuLayer) -> Tensor:
        """Returns the routed experts: int64 (T, K)."""
        act = self.config.hidden_act
        normed_TH = layer.post_norm(x_TH)
        routing = routing_of(self.config, normed_TH.mm(layer.router_HE), layer.bias_E)
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
        chosen, weights = experts_TK.tolist(), weights_TK.tolist()
        for expert in layer.shared:
            expert.add_(x_TH, normed_TH, act, 1.0)
        if len(chosen) == 1:
            for number, weight in zip(chosen[0], weights[0], strict=True):
                layer.routed[number].add_(x_TH, normed_TH, act, weight)
            return experts_TK
        tokens_of: dict[int, list[int]] = {}
        weights_of: dict[int, list[list[float]]] = {}
        for token, (numbers_K, weights_K) in enumerate(zip(chosen, weights, strict=True)):
            for number, weight in zip(numbers_K, weights_K, strict=True):
                tokens_of.setdefault(number, []).append(token)
                weights_of.setdefault(number, []).append([weight])
        for number, tokens in tokens_of.items():
            token_X = torch.tensor(tokens)
            out_XH = torch.zeros(len(tokens), x_TH.shape[1])
            layer.routed[number].add_(out_XH, normed_TH[token_X], act, 1.0)
            x_TH.index_add_(0, token_X, out_XH.mul_(torch.tensor(weights_of[number])))
        return experts_TK


def _prepared(layer: LayerWeights, config: ModelConfig) -> CpuLayer:
    eps = config.rms_norm_eps

    def experts(gate_up_EPH: Tensor | None, down_EHI: Tensor | None) -> list[Expert]:
        if gate_up_EPH is None or down_EHI is None:
            return []
        return [Expert(Matrix(gate_up), Matrix(down)) for gate_up, down in zip(gate_up_EPH, down_EHI, strict=True)]

    return CpuLayer(
        Norm(layer.input_norm_H, eps),
        Matrix(layer.qkv_XH),
        None if layer.q_norm_D is None else Norm(layer.q_norm_D, eps),
        None if layer.k_norm_D is None else Norm(layer.k_norm_D, eps),
        None if layer.sinks_N is None else layer.sinks_N.view(config.num_key_value_heads, -1),
        Matrix(layer.o_proj_HX),
        Norm(layer.post_norm_H, eps),
        layer.router_EH.t(),
        layer.bias_E,
        experts(layer.gate_up_EPH, layer.down_EHI),
        experts(layer.shared_gate_up_SPH, layer.shared_down_SHI),
    )


def _attended(
    q_TGMD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, sinks_GM: Tensor | None, places: Places
) -> Tensor:
    """Attention over each sequence's slot: of slots side by side in one call, else of one after the other."""
    if places.mask_T1MC is not None:
        first, count, used = places.slots[0], len(places.slots), places.mask_T1MC.shape[-1]
        keys_TGCD, values_TGCD = (whole[first : first + count, :, :used] for whole in (keys_SGCD, values_SGCD))
        return cpu.attend(q_TGMD, keys_TGCD, values_TGCD, sinks_GM, places.mask_T1MC)
    outs = []
    for row, (slot, position) in enumerate(zip(places.slots, places.positions, strict=True)):
        keys_1GCD, values_1GCD = (whole[slot : slot + 1, :, : position + 1] for whole in (keys_SGCD, values_SGCD))
        outs.append(cpu.attend(q_TGMD[row : row + 1], keys_1GCD, values_1GCD, sinks_GM, None))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
