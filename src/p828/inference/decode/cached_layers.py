"""The model's layers over tokens whose keys and values join those of a cache: plain code for any device and dtype.

The same for a piece of one prompt (B = 1) and for the newest token of several sequences (S = 1).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from p828.inference.decode.cache import SlotCache
from p828.model.attention import Attention, AttentionMask, attend
from p828.model.backend import AttentionBackend
from p828.model.rope import apply_rotary, rotary
from p828.model.transformer import Transformer


def cached_hidden(
    model: Transformer,
    cache: SlotCache,
    backend: AttentionBackend,
    tokens_BS: Tensor,
    slots: Sequence[int],
    positions_BS: Tensor,
    used: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm, (B, S, H) in `dtype`, and the routed experts, int64 (L, B · S, K).

    Row b's tokens are stored in slot `slots[b]` at `positions_BS` (int64); each sees those at positions up to its own.
    `used` is one more than the last position.
    """
    attended = CachedAttention(cache, backend, tokens_BS.device, slots, positions_BS, used)
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
    """Attention of one call of `cached_hidden`."""

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
        self.mask = AttentionMask(backend, mask_BSC)

    def output(self, layer: int, attention: Attention, x_BSH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        weight = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        qkv_BSXD = F.linear(x_BSH, weight.to(x_BSH.dtype)).unflatten(-1, (-1, attention.head_dim))
        q_BSND, k_BSGD, v_BSGD = qkv_BSXD.split(
            (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads), dim=2
        )
        q_BSND, k_BSGD = (
            apply_rotary(norm(x), *angles) for norm, x in ((attention.q_norm, q_BSND), (attention.k_norm, k_BSGD))
        )
        self.cache.store(layer, self.slots_B1, self.positions_BS, k_BSGD, v_BSGD)
        k_BCGD, v_BCGD = (self._used(whole[layer]) for whole in (self.cache.keys, self.cache.values))
        return attention.o_proj(attend(q_BSND, k_BCGD, v_BCGD, attention.sinks, self.mask).flatten(2))

    def _used(self, slots_SCGD: Tensor) -> Tensor:
        """(B, C, G, D): a view for one sequence, a copy for several."""
        if len(self.slots) == 1:
            return slots_SCGD[self.slots[0] : self.slots[0] + 1, : self.used]
        return slots_SCGD[self.slots_B1[:, 0], : self.used]
