"""The figures of a row, worked out by hand."""

import pytest

from p828.bench.measure import quartiles
from p828.bench.rows import make_row
from p828.bench.table import WIDTH, header, show_breakdown, show_failure, show_ratios, show_row
from p828.config import Config, DataConfig, ModelConfig, TrainConfig

MEASURED = {
    "version": "1.2.3", "step_seconds": 0.004, "step_seconds_quartiles": (0.0039, 0.0044), "first_step_seconds": 1.5,
    "peak_memory_bytes": 2_500_000_000, "peak_reserved_bytes": 2_700_000_000, "parameters": 1_234_567,
    "weights": "bfloat16", "moments": "bfloat16", "attended_pairs": 50,
}  # fmt: skip


def small() -> Config:
    model = ModelConfig(
        vocab_size=10, hidden_size=4, moe_intermediate_size=3, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, n_routed_experts=5, n_shared_experts=1, num_experts_per_tok=2,
    )  # fmt: skip
    return Config(
        model=model, data=DataConfig(sequence_length=8), train=TrainConfig(micro_batch_size=3, gradient_accumulation=4)
    )


def test_figures() -> None:
    row = make_row("s", "model", "name", "transformers", small(), MEASURED, matmul_flops=1e8)
    # 4 ms a step of 4 micro-batches of 3 × 8 tokens.
    assert row.ms == pytest.approx(1.0)
    assert row.ms_quartiles == pytest.approx((0.975, 1.1))
    assert row.tokens_per_second == pytest.approx(24_000)
    # Multiply-adds of a token: q and o 4·4 each, k and v 4·2 each = 48; router 4·5 = 20; 2 + 1 experts of
    # 3·4·3 = 108; two layers of these 176, and the head 4·10. Of a pair of tokens, scores and values of 2 heads of 2:
    # 8 in each layer. Two FLOPs each, and backward costs twice the forward.
    flops = 3 * 2 * (3 * 8 * (2 * 176 + 40) + 50 * 2 * 8)
    assert row.tflops == pytest.approx(1000 * flops / 1e12)
    assert row.mfu == pytest.approx(1000 * flops / 1e8)


def test_text_fits_eighty_columns() -> None:
    long = "p828, without sinks, q/k norm, document masking"
    fast, slow = ({**MEASURED, "step_seconds": seconds} for seconds in (0.00004, 0.0396))
    peer = make_row("s", "model", "torchtitan, compiled, float32 weights", "torchtitan", small(), slow, 1e8)
    own = make_row("s", "model", long, "p828", small(), fast, 1e15)
    part = {"ms": 1.0, "parts": {"norms and elementwise": 0.25, "GPU idle": 0.75}}
    kernel = {"name": "void at::native::" + "x" * 300, "part": "norms and elementwise", "ms": 0.25, "times": 3.0}
    texts = [
        header(), show_row(peer, None), show_row(own, peer), *show_ratios([own, own], [peer]),
        show_failure("x", "word " * 50 + "\n" + "y" * 300), show_breakdown({**part, "kernels": [kernel]}),
    ]  # fmt: skip
    assert all(len(line) <= WIDTH for text in texts for line in text.splitlines()), "\n".join(texts)


def test_ratios() -> None:
    slow, fast = ({**MEASURED, "step_seconds": seconds} for seconds in (0.004, 0.003))
    small_memory = {**fast, "peak_memory_bytes": 2_000_000_000}
    peer = make_row("s", "model", "peer", "torchtitan", small(), slow, 1e8)
    own = make_row("s", "model", "p828", "p828", small(), small_memory, 1e8)
    plain = make_row("s", "model", "p828, plain", "p828", small(), {**fast, "step_seconds": 0.0025}, 1e8)
    assert show_ratios([own, plain], [peer]) == [
        "p828 against peer: 1.33 × tok/s, 0.80 × peak memory",
        "sinks, q/k norm and document masking: +20.0% time",
    ]
    assert " 1.33\n" in show_row(own, peer)


def test_noise_is_shown() -> None:
    noisy = {**MEASURED, "step_seconds_quartiles": (0.003, 0.0052)}
    shown = [show_row(make_row("s", "model", "x", "p828", small(), m, 1e8), None) for m in (MEASURED, noisy)]
    assert "noisy" in shown[0], "quartiles 13% apart"
    assert "0.75 to 1.30 ms" in shown[1]
    calm = {**MEASURED, "step_seconds_quartiles": (0.0039, 0.0041)}
    assert "noisy" not in show_row(make_row("s", "model", "x", "p828", small(), calm, 1e8), None)
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 100.0]) == (2.0, 4.0)
