"""The model's layers over tokens whose keys and values join those of a cache.

The same for a piece of one prompt (B = 1) and for the newest token of several sequences (S = 1).
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from p828.inference.decode.cache import SlotCache
from p828.kernels.attention.ops import causal_attention, rotated_heads
from p828.model.attention import Attention, AttentionMask, attend
from p828.model.backend import AttentionBackend
from p828.model.rope import apply_rotary, rotary
from p828.model.transformer import Transformer

QUERY_BLOCK = 128  # tokens, at most, of a block of queries in the flash kernel


class Attended(Protocol):
    def output(self, layer: int, attention: Attention, x_BSH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """What a layer's attention adds, (B, S, H); the tokens' keys and values are in the cache afterwards."""


def cached_hidden(
    model: Transformer, tokens_BS: Tensor, positions_BS: Tensor, attended: Attended, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm, (B, S, H) in `dtype`, and the routed experts, int64 (L, B · S, K)."""
    angles = rotary(positions_BS, model.frequencies, model.config.rope_scaling.factor)
    x_BSH = model.embed(tokens_BS, dtype)
    delta_BSH = torch.zeros_like(x_BSH)
    experts = []
    for index, layer in enumerate(model.layers):
        x_BSH, normed_BSH = layer.input_layernorm(x_BSH, delta_BSH)
        x_BSH, normed_BSH = layer.post_attention_layernorm(
            x_BSH, attended.output(index, layer.self_attn, normed_BSH, angles)
        )
        normed_TH = normed_BSH.flatten(0, 1)
        routing = layer.mlp.gate(normed_TH)
        permutation = layer.mlp.experts.permutation(normed_TH, routing.experts_TK, None)
        delta_BSH = layer.mlp(normed_TH, routing.weights_TK, permutation).view_as(x_BSH)
        experts.append(routing.experts_TK)
    return model.model.norm(x_BSH, delta_BSH)[1], torch.stack(experts)


class CachedAttention:
    """Plain code for any device and dtype. Row b's tokens are stored in slot `slots[b]`, at `positions_BS` (int64).

    Each sees those at positions up to its own. `used` is one more than the last position. `backend` computes a prompt's
    pieces, `reference` a single token.
    """

    def __init__(
        self,
        cache: SlotCache,
        backend: AttentionBackend,
        device: torch.device,
        slots: Sequence[int],
        positions_BS: Tensor,
        used: int,
    ) -> None:
        self.cache, self.slots, self.positions_BS, self.used = cache, slots, positions_BS, used
        self.slots_B1 = torch.tensor(slots, device=device)[:, None]
        is_whole = positions_BS.shape == (1, used)  # a prompt's first piece: plain causal attention
        mask_BSC = None if is_whole else torch.arange(used, device=device) <= positions_BS[:, :, None]
        self.mask = AttentionMask(backend if positions_BS.shape[1] > 1 else "reference", mask_BSC)

    def output(self, layer: int, attention: Attention, x_BSH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        q_BSND, k_BSGD, v_BSGD = projected(attention, x_BSH).split(
            (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads), dim=2
        )
        q_BSND, k_BSGD = (
            apply_rotary(norm(x), *angles) for norm, x in ((attention.q_norm, q_BSND), (attention.k_norm, k_BSGD))
        )
        self.cache.store(layer, self.slots_B1, self.positions_BS, k_BSGD, v_BSGD)
        k_BCGD, v_BCGD = (self._used(whole[layer]) for whole in (self.cache.keys, self.cache.values))
        return attention.o_proj(attend(q_BSND, k_BCGD, v_BCGD, attention.sinks, self.mask).flatten(2))

    def _used(self, slots_SGCD: Tensor) -> Tensor:
        """(B, C, G, D): a view for one sequence, a copy for several."""
        if len(self.slots) == 1:
            used_BGCD = slots_SGCD[self.slots[0] : self.slots[0] + 1, :, : self.used]
        else:
            used_BGCD = slots_SGCD[self.slots_B1[:, 0], :, : self.used]
        return used_BGCD.transpose(1, 2)


class FlashAttention:
    """A piece of one prompt by the flash kernel on a GPU: tokens from `begin` on, in the slot `slot_1` (int64).

    Tokens beyond the prompt, which fill up a piece, may be among them: whatever they leave is overwritten before it is
    read. `slot` is the number in `slot_1`, for a piece that reads others' keys: None for a prompt's first piece.
    """

    def __init__(self, cache: SlotCache, slot_1: Tensor, positions_1S: Tensor, begin: int, slot: int | None) -> None:
        self.cache, self.slot_1, self.begin, self.slot = cache, slot_1, begin, slot
        self.positions_S = positions_1S[0].clamp(max=cache.max_length - 1)
        tokens = begin + positions_1S.shape[1]
        self.first_key_T = torch.zeros(tokens, dtype=torch.int32, device=slot_1.device)
        # Queries before the piece see no key, and so cost nothing; but a block of queries is of one kind.
        self.first_key_T[: max(begin - QUERY_BLOCK, 0)] = tokens

    def output(self, layer: int, attention: Attention, x_BSH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        norms = (attention.q_norm, attention.k_norm)
        q_norm_D, k_norm_D = (cast(Tensor, norm.weight).float() if attention.use_qk_norm else None for norm in norms)
        sinks_N = None if attention.sinks is None else attention.sinks.float()
        qkv_SXD = projected(attention, x_BSH)[0]
        cos, sin = (angle.flatten(0, 2) for angle in angles)
        q_SND, k_SGD = rotated_heads(qkv_SXD, q_norm_D, k_norm_D, cos, sin, attention.num_heads, attention.eps)
        v_SGD = qkv_SXD[:, attention.num_heads + attention.num_kv_heads :]
        self.cache.store(layer, self.slot_1, self.positions_S, k_SGD, v_SGD)
        if self.slot is not None:
            tokens = len(self.first_key_T)
            q_SND = torch.cat((q_SND.new_zeros(self.begin, *q_SND.shape[1:]), q_SND))
            k_SGD, v_SGD = (
                whole[layer][self.slot, :, :tokens].transpose(0, 1).contiguous()
                for whole in (self.cache.keys, self.cache.values)
            )
        out_SND = causal_attention(q_SND, k_SGD, v_SGD, sinks_N, self.first_key_T)[self.begin :]
        return attention.o_proj(out_SND.flatten(1))[None]


def projected(attention: Attention, x_BSH: Tensor) -> Tensor:
    """(B, S, X, D): N query heads, G key heads, G value heads."""
    weight = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    return F.linear(x_BSH, weight.to(x_BSH.dtype)).unflatten(-1, (-1, attention.head_dim))
