"""Grouped-query attention with rotary positions and learned sinks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.kernels.attention.flash_cpu import FlashAttentionCPU
from p828.kernels.attention.ops import attention
from p828.model.backend import AttentionBackend
from p828.model.linear import Linear
from p828.model.norm import RMSNorm
from p828.model.rope import apply_rotary


class AttentionMask(NamedTuple):
    """Which keys a query sees: its own and those before it, within its document. Made once for all layers."""

    backend: AttentionBackend
    mask_BSC: Tensor | None = None
    """bool, True where query s sees key c; None if it sees all keys up to its own, or with the bounds below."""
    document_start_T: Tensor | None = None
    """int32: the first token of each token's document; for `flash_triton`."""
    document_end_T: Tensor | None = None
    """int32: one past the last token of each token's document."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.use_qk_norm, self.eps = config.use_qk_norm, config.rms_norm_eps
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sinks else None

    def forward(self, x_BSH: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        # One product for the three: those of keys and values alone are too narrow to fill a GPU.
        weight = torch.cat([projection.weight for projection in (self.q_proj, self.k_proj, self.v_proj)])
        qkv_BSXD = F.linear(x_BSH, weight.to(x_BSH.dtype)).unflatten(-1, (-1, self.head_dim))  # X: N + 2 G heads
        if mask.backend == "flash_triton":
            return self.o_proj(self._flash_triton(qkv_BSXD, rotary, mask).flatten(2))
        q_BSND, k_BSGD, v_BSGD = qkv_BSXD.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        q_BSND, k_BSGD = (apply_rotary(norm(x), *rotary) for norm, x in ((self.q_norm, q_BSND), (self.k_norm, k_BSGD)))
        return self.o_proj(attend(q_BSND, k_BSGD, v_BSGD, self.sinks, mask).flatten(2))

    def _flash_triton(self, qkv_BSXD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        """Norms, rotation and attention on a GPU: (B, S, N, D)."""
        norms = (self.q_norm.weight.float(), self.k_norm.weight.float()) if self.use_qk_norm else (None, None)
        sinks_N = None if self.sinks is None else self.sinks.float()
        cos, sin = (angles.flatten(0, 2) for angles in rotary)
        out_TND = attention(
            qkv_BSXD.flatten(0, 1), *norms, cos, sin, sinks_N, mask.document_start_T, mask.document_end_T,
            self.num_heads, len(qkv_BSXD), self.eps,
        )[0]  # fmt: skip
        return out_TND.unflatten(0, qkv_BSXD.shape[:2])


def attend(q_BSND: Tensor, k_BCGD: Tensor, v_BCGD: Tensor, sinks_N: Tensor | None, mask: AttentionMask) -> Tensor:
    """softmax([q kᵀ / sqrt(D), sink]) v without the sink's column: (B, S, N, D) in q's dtype.

    Keys hold C tokens, as many as the queries unless they come from a cache. `sinks_N` is float32 or None.
    """
    if mask.backend == "reference":
        return reference_attention(q_BSND, k_BCGD, v_BCGD, sinks_N, mask.mask_BSC)
    mask_B1SC = None
    if mask.mask_BSC is not None:
        mask_B1SC = torch.zeros_like(mask.mask_BSC, dtype=q_BSND.dtype)
        mask_B1SC = mask_B1SC.masked_fill_(~mask.mask_BSC, float("-inf"))[:, None]
    q_BNSD, k_BGCD, v_BGCD = (x.transpose(1, 2) for x in (q_BSND, k_BCGD, v_BCGD))
    return FlashAttentionCPU.apply(q_BNSD, k_BGCD, v_BGCD, sinks_N, mask_B1SC).transpose(1, 2)


def reference_attention(
    q_BSND: Tensor, k_BCGD: Tensor, v_BCGD: Tensor, sinks_N: Tensor | None, mask_BSC: Tensor | None
) -> Tensor:
    """`attend` spelled out, on any device in any dtype: scores, one more column for the sink, softmax, drop it."""
    batch, length, heads, head_dim = q_BSND.shape
    groups = k_BCGD.shape[2]
    q_BSGMD = q_BSND.view(batch, length, groups, heads // groups, head_dim)  # M query heads share a key head
    scores_BGMSC = torch.einsum("bsgmd,bcgd->bgmsc", q_BSGMD, k_BCGD).to(_softmax_dtype(q_BSND)) * head_dim**-0.5
    if mask_BSC is None:
        mask_BSC = torch.ones(length, k_BCGD.shape[1], dtype=torch.bool, device=q_BSND.device).tril()[None]
    scores_BGMSC = scores_BGMSC.masked_fill(~mask_BSC[:, None, None], float("-inf"))
    if sinks_N is not None:
        sinks_BGMS1 = sinks_N.to(scores_BGMSC.dtype).view(1, groups, -1, 1, 1).expand(batch, -1, -1, length, 1)
        scores_BGMSC = torch.cat((scores_BGMSC, sinks_BGMS1), dim=-1)
    probabilities_BGMSC = scores_BGMSC.softmax(dim=-1)[..., : k_BCGD.shape[1]].to(v_BCGD.dtype)
    return torch.einsum("bgmsc,bcgd->bsgmd", probabilities_BGMSC, v_BCGD).reshape_as(q_BSND)


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
