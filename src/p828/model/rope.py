"""Rotary position embeddings (arXiv 2104.09864) with YaRN's NTK-by-parts scaling (arXiv 2309.00071, section 3.2)."""

import math

import torch
from torch import Tensor

from p828.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Angle per position of each rotated pair: float32 (head_dim / 2,) on the CPU, fastest first.

    Pairs that turn more than `beta_fast` times over the original context keep their frequency, pairs that turn less
    than `beta_slow` times are slowed by `factor`, and a linear ramp over the pair's index joins the two.
    """
    pair = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    frequency = theta ** (-2 * pair / head_dim)
    if scaling.factor == 1:
        return frequency
    low = max(math.floor(_pair_turning(scaling.beta_fast, head_dim, theta, scaling)), 0)
    high = min(math.ceil(_pair_turning(scaling.beta_slow, head_dim, theta, scaling)), head_dim - 1)
    interpolated = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - interpolated) + frequency / scaling.factor * interpolated


def _pair_turning(rotations: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """Fractional index of the pair that turns `rotations` times over the original context."""
    context = scaling.original_max_position_embeddings
    return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def attention_factor(factor: float) -> float:
    """YaRN's factor on cos and sin, 0.1 ln s + 1, which sharpens attention over the longer context (section 3.4)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def rotary(positions_BS: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, each float32 (B, S, 1, D / 2), scaled by YaRN's attention factor."""
    angles = positions_BS[:, :, None, None].float() * frequencies
    scale = attention_factor(factor)
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary(x_BSND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head in float32; returns x's dtype."""
    first, second = x_BSND.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSND.dtype)
