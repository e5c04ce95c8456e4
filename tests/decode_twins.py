"""The plain twins of `p828.kernels.decode.ops`: the same signatures, on any device in any floating dtype.

Sums, norms and softmaxes are in float32, or in float64 for tensors of that. Attention and the experts ask the host for
lengths and choices: for a CPU that costs nothing, and no more than what is used is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TH = _total(x_TH, parts_TJH)
    return total_TH, _normalise(total_TH.to(_wide(x_TH)), norm_weight_H, eps).to(x_TH.dtype)


def linear(x_TH: Tensor, weight_VH: Tensor, out_dtype: torch.dtype) -> Tensor:
    return F.linear(x_TH, weight_VH).to(out_dtype)


def norm_linear(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, weight_VH: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total_TH, normed_TH = add_norm(x_TH, parts_TJH, norm_weight_H, eps)
    return linear(normed_TH, weight_VH, out_dtype), total_TH


def embed_norm_linear(
    embedding_VH: Tensor, slots_T: Tensor, token_S: Tensor, norm_weight_H: Tensor, eps: float, weight_XH: Tensor
) -> tuple[Tensor, Tensor]:
    x_TH = embed(embedding_VH, slots_T, token_S)
    return norm_linear(x_TH, None, norm_weight_H, eps, weight_XH, x_TH.dtype)


def logits(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, head_VH: Tensor, slots_T: Tensor,
    position_S: Tensor,
) -> Tensor:  # fmt: skip
    return norm_linear(x_TH, parts_TJH, norm_weight_H, eps, head_VH, _wide(x_TH))[0]


def attention(
    qkv_TXD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, slots_T: Tensor, position_S: Tensor,
    frequencies: Tensor, factor: float, q_norm_D: Tensor | None, k_norm_D: Tensor | None, sinks_N: Tensor | None,
    eps: float, arrivals_TG: Tensor | None, o_proj_HX: Tensor,
) -> Tensor:  # fmt: skip
    wide, groups, head_dim = _wide(qkv_TXD), *keys_SGCD.shape[1::2]
    q_TND, k_TGD, v_TGD = qkv_TXD.split((qkv_TXD.shape[1] - 2 * groups, groups, groups), dim=1)
    positions_T = position_S[slots_T.clamp_min(0)]
    angles_T1X = (positions_T[:, None].float() * frequencies)[:, None].to(wide)
    rotation = angles_T1X.cos() * factor, angles_T1X.sin() * factor
    q_TND = _rotate(_head_norm(q_TND.to(wide), q_norm_D, eps), *rotation).to(qkv_TXD.dtype)
    k_TGD = _rotate(_head_norm(k_TGD.to(wide), k_norm_D, eps), *rotation)
    out_TND = torch.zeros_like(q_TND)
    for t, (slot, position) in enumerate(zip(slots_T.tolist(), positions_T.tolist(), strict=True)):
        if slot < 0:
            continue
        keys_SGCD[slot, :, position], values_SGCD[slot, :, position] = k_TGD[t], v_TGD[t]
        keys_GCD, values_GCD = (cache[slot, :, : position + 1].to(wide) for cache in (keys_SGCD, values_SGCD))
        scores_GMC = q_TND[t].unflatten(0, (groups, -1)).to(wide) @ keys_GCD.mT * head_dim**-0.5
        if sinks_N is not None:
            scores_GMC = torch.cat((scores_GMC, sinks_N.to(wide).view(groups, -1, 1)), dim=-1)
        shares_GMC = scores_GMC.softmax(dim=-1)[..., : position + 1]
        out_TND[t] = (shares_GMC @ values_GCD).flatten(0, 1)
    return F.linear(out_TND.flatten(1), o_proj_HX)


def route(
    x_TH: Tensor, parts_TJH: Tensor | None, norm_weight_H: Tensor, eps: float, router_weight_EH: Tensor,
    bias_E: Tensor, per_token: int, shared: int, scoring_func: str, n_group: int, topk_group: int,
    norm_topk_prob: bool, routed_scaling_factor: float, arrivals_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total_TH, normed_TH = add_norm(x_TH, parts_TJH, norm_weight_H, eps)
    wide = torch.promote_types(router_weight_EH.dtype, torch.float32)
    logits_TE = F.linear(normed_TH.to(wide), router_weight_EH.to(wide))
    scores_TE = logits_TE.softmax(dim=-1) if scoring_func == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE + bias_E
    if n_group > 1:
        choice_TE = _limit_groups(choice_TE, n_group, topk_group)
    experts_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :per_token]
    weights_TK = scores_TE.gather(1, experts_TK)
    if norm_topk_prob:
        # The floor keeps a token whose chosen scores all underflow to zero from dividing by zero.
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    shared_ids = torch.arange(shared, device=x_TH.device) + len(router_weight_EH)
    experts_TJ = torch.cat((experts_TK, shared_ids.expand(len(x_TH), -1)), dim=1).to(torch.int32)
    weights_TJ = F.pad(weights_TK * routed_scaling_factor, (0, shared), value=1.0)
    return total_TH, normed_TH, experts_TJ, weights_TJ


def experts(
    x_TH: Tensor, experts_TJ: Tensor, weights_TJ: Tensor, gate_up_EXH: Tensor, down_EHI: Tensor,
    shared_gate_up_SXH: Tensor | None, shared_down_SHI: Tensor | None, hidden_act: str,
) -> Tensor:  # fmt: skip
    wide = _wide(x_TH)
    parts_TJH = torch.zeros(*experts_TJ.shape, x_TH.shape[1], dtype=wide, device=x_TH.device)
    for expert in experts_TJ.unique().tolist():
        token_X, choice_X = (experts_TJ == expert).nonzero(as_tuple=True)
        if expert < len(down_EHI):
            gate_up_XH, down_HI = gate_up_EXH[expert], down_EHI[expert]
        else:
            assert shared_gate_up_SXH is not None
            assert shared_down_SHI is not None
            gate_up_XH, down_HI = (w[expert - len(down_EHI)] for w in (shared_gate_up_SXH, shared_down_SHI))
        gate_XP, up_XP = F.linear(x_TH[token_X], gate_up_XH).to(wide).chunk(2, dim=-1)
        if hidden_act == "swiglu_of_product":
            gate_XP, up_XP = (gate_XP * up_XP).chunk(2, dim=-1)
        out_XH = F.linear((F.silu(gate_XP) * up_XP).to(x_TH.dtype), down_HI)
        parts_TJH[token_X, choice_X] = out_XH.to(wide) * weights_TJ[token_X, choice_X, None]
    return parts_TJH


def embed(embedding_VH: Tensor, slots_T: Tensor, token_S: Tensor) -> Tensor:
    return embedding_VH[token_S[slots_T]]


def choose_tokens(
    logits_TV: Tensor, slots_T: Tensor, temperature_S: Tensor, uniform_SC: Tensor, token_S: Tensor, position_S: Tensor,
    told_SC: Tensor, arrivals_T: Tensor | None,
) -> Tensor:  # fmt: skip
    position_T = (position_S[slots_T] + 1).clamp(max=uniform_SC.shape[1] - 1)
    temperature_T = temperature_S.flatten()[slots_T]
    likeliest_T = logits_TV.argmax(dim=-1)
    probability_TV = (logits_TV / temperature_T.where(temperature_T > 0, 1.0)[:, None]).softmax(dim=-1)
    through_TV = probability_TV.cumsum(dim=-1)
    threshold_T = uniform_SC[slots_T, position_T] * through_TV[:, -1]
    drawn_T = (through_TV <= threshold_T[:, None]).sum(dim=-1)
    # Rounded up, a number just below 1 may reach the sum of all.
    is_drawn_T = (temperature_T > 0) & (drawn_T < logits_TV.shape[1])
    token_T = drawn_T.where(is_drawn_T, likeliest_T).where(logits_TV.isfinite().all(dim=-1), -1)
    token_S[slots_T], position_S[slots_T] = token_T.clamp(min=0), position_T
    told_SC[slots_T, position_T] = token_T.int()
    return token_T


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _total(x_TH: Tensor, parts_TJH: Tensor | None) -> Tensor:
    if parts_TJH is None:
        return x_TH
    return (x_TH.to(_wide(x_TH)) + parts_TJH.to(_wide(x_TH)).sum(dim=1)).to(x_TH.dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def _head_norm(x_TXD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    return x_TXD if weight_D is None else _normalise(x_TXD, weight_D, eps)


def _rotate(x_TXD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (i, i + D/2) of every head, rotated."""
    first, second = x_TXD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _limit_groups(choice_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Minus infinity outside the `topk_group` groups whose two best experts sum highest; of equal ones the first."""
    grouped_TGX = choice_TE.unflatten(1, (n_group, -1))
    scores_TG = grouped_TGX.topk(2, dim=-1).values.sum(dim=-1)
    best_TG = scores_TG.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    kept_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter(1, best_TG, True)
    return grouped_TGX.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
