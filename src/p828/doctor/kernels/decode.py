"""The kernels of a decoding step, on a GPU in Triton and on a CPU in float32, against `p828.model` in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from p828.config import ModelConfig
from p828.doctor.kernels.comparison import Comparison, Place
from p828.kernels.decode import cpu, ops
from p828.model.attention import reference_attention
from p828.model.experts import activate
from p828.model.rope import apply_rotary, rotary
from p828.model.router import routing_of

HIDDEN, WIDTH, EXPERTS, PER_TOKEN, SHARED = 136, 72, 5, 2, 1
GROUPS, SHARING, HEAD_DIM, CONTEXT = 2, 4, 64, 200  # key heads, query heads of each, and places of a slot
POSITIONS = [0, 1, 63, 64, 199]  # of the newest token in each slot: single tokens, and around a tile
EPS = 1e-5
MODEL = ModelConfig(n_routed_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, hidden_size=HIDDEN)


def products(place: Place) -> list[Comparison]:
    """A product behind a norm of a sum of experts' parts."""
    x_TH, parts_TJH, gain_H = place.randn(5, HIDDEN), place.randn(5, 3, HIDDEN), place.randn(HIDDEN)
    weight_VH = place.randn(50, HIDDEN, scale=HIDDEN**-0.5)
    total_TH = x_TH + parts_TJH.sum(1)
    expected_TV = F.rms_norm(total_TH, (HIDDEN,), gain_H, EPS) @ weight_VH.T
    if place.device.type == "cuda":
        actual_TV, sum_TH = ops.norm_linear(
            _to(place, x_TH), _to(place, parts_TJH), _to(place, gain_H, torch.float32), EPS, _to(place, weight_VH),
            torch.float32,
        )  # fmt: skip
    else:
        sum_TH = total_TH.float()
        actual_TV = cpu.Matrix(weight_VH.float())(cpu.Norm(gain_H.float(), EPS)(sum_TH))
    return [
        Comparison("product", actual_TV, expected_TV, 2 * place.tolerance),
        Comparison("sum", sum_TH, total_TH, place.tolerance),
    ]


def attention(place: Place) -> list[Comparison]:
    """A new token in each of several slots, with sinks, over keys and values of different lengths."""
    tokens, heads = len(POSITIONS), GROUPS * SHARING
    qkv_TXD = place.randn(tokens, heads + 2 * GROUPS, HEAD_DIM)
    keys_SGCD, values_SGCD = (place.randn(tokens, GROUPS, CONTEXT, HEAD_DIM) for _ in range(2))
    sinks_N = place.randn(heads)
    frequencies = 10_000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    expected_TX = _attended(qkv_TXD, keys_SGCD, values_SGCD, sinks_N, frequencies)
    if place.device.type != "cuda":
        on_cpu_TX = _on_cpu(qkv_TXD, keys_SGCD, values_SGCD, sinks_N, frequencies)
        return [Comparison("output with sinks", on_cpu_TX, expected_TX, place.tolerance)]
    slots_T, position_S = (torch.tensor(x, dtype=torch.int32, device=place.device) for x in (range(tokens), POSITIONS))
    arrivals_TG = torch.zeros(tokens, GROUPS, dtype=torch.int32, device=place.device)
    actual_TX = ops.attention(
        _to(place, qkv_TXD), _to(place, keys_SGCD), _to(place, values_SGCD), slots_T, position_S,
        frequencies.to(place.device), 1.0, None, None, _to(place, sinks_N, torch.float32), EPS, arrivals_TG,
        _to(place, torch.eye(heads * HEAD_DIM)),
    ).sum(dim=1)  # fmt: skip
    return [Comparison("output with sinks", actual_TX, expected_TX, 2 * place.tolerance)]


def experts(place: Place) -> list[Comparison]:
    """The choice of experts, and their parts, with experts that get no token among them."""
    x_TH, gain_H = place.randn(2, HIDDEN), place.randn(HIDDEN)
    router_EH = torch.randn(EXPERTS, HIDDEN, generator=place.generator) * HIDDEN**-0.5
    gate_up_EXH = place.randn(EXPERTS + SHARED, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    down_EHI = place.randn(EXPERTS + SHARED, HIDDEN, WIDTH, scale=WIDTH**-0.5)
    bias_E = torch.linspace(-0.2, 0.2, EXPERTS)
    routed = ops.route(
        _to(place, x_TH), None, _to(place, gain_H, torch.float32), EPS, _to(place, router_EH, torch.float32),
        bias_E.to(place.device), PER_TOKEN, SHARED, "sigmoid", 1, 1, True, 1.0,
        torch.zeros(len(x_TH), dtype=torch.int32, device=place.device),
    )  # fmt: skip
    _, normed_TH, experts_TJ, weights_TJ = routed
    parts_TXH = ops.experts(
        normed_TH, experts_TJ, weights_TJ, _to(place, gate_up_EXH[:EXPERTS]), _to(place, down_EHI[:EXPERTS]),
        _to(place, gate_up_EXH[EXPERTS:]), _to(place, down_EHI[EXPERTS:]), "swiglu",
    )  # fmt: skip
    # From the normalised tokens as the kernel rounds them, so that no choice hangs on a rounding.
    twin_TH = normed_TH.double().cpu()
    routing = routing_of(MODEL, twin_TH @ router_EH.double().T, bias_E.double())
    expected_TH = _mixed(twin_TH, routing.experts_TK, routing.weights_TK, gate_up_EXH, down_EHI)
    return [
        Comparison("experts", experts_TJ[:, :PER_TOKEN], routing.experts_TK, 0.0),
        Comparison("weights", weights_TJ[:, :PER_TOKEN], routing.weights_TK, place.tolerance),
        Comparison("output", parts_TXH.sum(1), expected_TH, 2 * place.tolerance),
    ]


def tokens(place: Place) -> list[Comparison]:
    """The likeliest token of each row, of equal ones the first, and the embedding of the newest tokens."""
    rows, width = 3, 9000
    embedding_VH, logits_TV = place.randn(width, HIDDEN), torch.randn(rows, width, generator=place.generator)
    logits_TV[0, [width // 3, width - 1]] = 100.0
    slots, newest = torch.arange(rows), torch.tensor([7, 8_999, 0])
    slots_T, token_S = slots.to(place.device), newest.to(place.device)
    position_S = torch.tensor([0, 4, 7], device=place.device)
    embedded_TH = ops.embed(_to(place, embedding_VH), slots_T, token_S)
    arrivals = torch.zeros(rows, dtype=torch.int32, device=place.device)
    greedy, uniform = torch.zeros(rows, device=place.device), torch.zeros(rows, 16, device=place.device)
    told_SC = torch.zeros(rows, 16, dtype=torch.int32, device=place.device)
    chosen_T = ops.choose_tokens(
        logits_TV.to(place.device), slots_T, greedy, uniform, token_S, position_S, told_SC, arrivals
    )
    return [
        Comparison("embedding", embedded_TH, embedding_VH[newest], 0.0),
        Comparison("next tokens", chosen_T, logits_TV.argmax(1), 0.0),
        Comparison("at their positions", told_SC[slots, [1, 5, 8]], logits_TV.argmax(1), 0.0),
    ]


def _to(place: Place, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return values.to(place.device, dtype or place.dtype)


def _attended(qkv_TXD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, sinks_N: Tensor, frequencies: Tensor) -> Tensor:
    """Each token over the places of its slot up to its own, where its key and value are: (T, N · D)."""
    q_TND, k_TGD, v_TGD = qkv_TXD.split((GROUPS * SHARING, GROUPS, GROUPS), dim=1)
    rows = []
    for slot, position in enumerate(POSITIONS):
        angles = rotary(torch.tensor([[position]]), frequencies, 1.0)
        q_11ND, k_11GD = (apply_rotary(x[slot][None, None].float(), *angles).double() for x in (q_TND, k_TGD))
        keys, values = (cache[slot, :, :position].transpose(0, 1)[None] for cache in (keys_SGCD, values_SGCD))
        keys, values = torch.cat((keys, k_11GD), dim=1), torch.cat((values, v_TGD[slot][None, None]), dim=1)
        is_seen = torch.ones(1, 1, position + 1, dtype=torch.bool)
        rows.append(reference_attention(q_11ND, keys, values, sinks_N, is_seen).flatten())
    return torch.stack(rows)


def _on_cpu(qkv_TXD: Tensor, keys_SGCD: Tensor, values_SGCD: Tensor, sinks_N: Tensor, frequencies: Tensor) -> Tensor:
    """The same by the CPU's operations in float32: a token at a time, as its slot is as long as it is."""
    rows = []
    for slot, position in enumerate(POSITIONS):
        angles_1D = (position * frequencies).repeat(2)[None]
        cos, sin = angles_1D.cos(), angles_1D.sin() * torch.tensor([-1.0, 1.0]).repeat_interleave(HEAD_DIM // 2)
        q_ND, k_GD, v_GD = qkv_TXD[slot].float().split((GROUPS * SHARING, GROUPS, GROUPS))
        q_GMD = cpu.rotate(q_ND, cos, sin).view(GROUPS, SHARING, HEAD_DIM)
        keys, values = (cache[slot, :, :position].float() for cache in (keys_SGCD, values_SGCD))
        keys_GCD = torch.cat((keys, cpu.rotate(k_GD, cos, sin)[:, None]), dim=1)
        values_GCD = torch.cat((values, v_GD[:, None]), dim=1)
        sinks_GM1 = sinks_N.float().view(GROUPS, SHARING, 1)
        rows.append(cpu.attend(q_GMD, keys_GCD, values_GCD, sinks_GM1, torch.zeros(1, 1, 1)).flatten())
    return torch.stack(rows)


def _mixed(x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_EXH: Tensor, down_EHI: Tensor) -> Tensor:
    """Σ weight · expert over the chosen ones and the shared one, which are the last: (T, H)."""
    gate_TEI, up_TEI = torch.einsum("th,exh->tex", x_TH, gate_up_EXH).chunk(2, dim=-1)
    out_TEH = torch.einsum("tei,ehi->teh", activate("swiglu", gate_TEI, up_TEI), down_EHI)
    weights_TE = F.pad(
        torch.zeros(len(x_TH), EXPERTS, dtype=x_TH.dtype).scatter(1, experts_TK, weights_TK), (0, SHARED), value=1.0
    )
    return (out_TEH * weights_TE[..., None]).sum(1)
