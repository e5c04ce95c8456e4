"""The slow truth: the model's parts once more, token by token in float64, in the most naive way.

Also the measure of distance and the tolerances that the arithmetic gives:

- float64 twins do the same operations in another order. Sums of at most some thousand terms differ by less than
  a few hundred units of 2^-53: `FLOAT64` = 1e-12.
- float32 carries 2^-24 = 6e-8 per operation, and errors over sums of up to a hundred terms add as their root:
  `FLOAT32` = 3e-6 for one part of the model.
- bfloat16 carries 2^-9 = 2e-3 per rounding; a part of the model rounds its inputs, one or two intermediate values and
  its output: `BFLOAT16` = 1e-2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from p828.config import ModelConfig

FLOAT64, FLOAT32, BFLOAT16 = 1e-12, 3e-6, 1e-2


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """‖actual − expected‖ ≤ tolerance · ‖expected‖.

    Below norm 1 the distance is absolute: inputs here are of unit size, so what is smaller is what cancelled.
    """
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    distance = (actual.detach().double().cpu() - expected.detach().double().cpu()).norm().item()
    scale = max(expected.detach().double().norm().item(), 1.0)
    assert distance <= tolerance * scale, f"relative error {distance / scale:.2e} above {tolerance:.0e}"


def leaves(*tensors: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor | None]:
    """Copies that collect their own gradients."""
    return [None if t is None else t.detach().to(device, dtype, copy=True).requires_grad_() for t in tensors]


def naive_attention(
    q_BSND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, sinks_N: Tensor | None, documents_BS: Tensor
) -> Tensor:
    """Causal attention, one query of one head at a time: softmax over [scores, sink], the sink's column dropped."""
    batch, length, heads, head_dim = q_BSND.shape
    sharing = heads // k_BSGD.shape[2]
    outputs = []
    for b in range(batch):
        for s in range(length):
            visible = [c for c in range(s + 1) if documents_BS[b, c] == documents_BS[b, s]]
            for n in range(heads):
                scores = k_BSGD[b, visible, n // sharing] @ q_BSND[b, s, n] / math.sqrt(head_dim)
                if sinks_N is not None:
                    scores = torch.cat((scores, sinks_N[n : n + 1]))
                outputs.append(scores.softmax(0)[: len(visible)] @ v_BSGD[b, visible, n // sharing])
    return torch.stack(outputs).view(batch, length, heads, head_dim)


def naive_activation(hidden_act: str, gate: Tensor, up: Tensor) -> Tensor:
    if hidden_act == "swiglu":
        return gate * torch.sigmoid(gate) * up
    product = gate * up
    first, second = product[: len(product) // 2], product[len(product) // 2 :]
    return first * torch.sigmoid(first) * second


def naive_experts(
    hidden_act: str, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Σ_k weight · W2 act(W1 x, W3 x), one token and one expert at a time."""
    outputs = []
    for t, chosen in enumerate(experts_TK.tolist()):
        terms = [
            weights_TK[t, k] * (down[e] @ naive_activation(hidden_act, gate[e] @ x_TH[t], up[e] @ x_TH[t]))
            for k, e in enumerate(chosen)
        ]
        outputs.append(torch.stack(terms).sum(0))
    return torch.stack(outputs)


def naive_routing(config: ModelConfig, logits_E: list[float], bias_E: list[float]) -> dict[int, float]:
    """One token's expert -> weight, in Python floats."""
    if config.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits_E]
    else:
        total = sum(math.exp(x) for x in logits_E)
        scores = [math.exp(x) / total for x in logits_E]
    biased = [s + b for s, b in zip(scores, bias_E, strict=True)]
    size = len(biased) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    if config.n_group > 1:
        groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: config.topk_group] for e in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
    norm = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / norm * config.routed_scaling_factor for e in chosen}


def naive_loss(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(hidden_TH @ weight_VH.T, targets_T, ignore_index=-100, reduction="sum")
