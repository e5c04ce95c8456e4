"""Kernels sorted into the parts of a model."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from p828.bench.breakdown import OTHER, Work, break_down, classify, cpu_work, summarise
from p828.bench.step import OwnStep
from p828.config import Config, DataConfig, TrainConfig
from tiny import tiny_config

NAMES = {
    "attention_forward": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0": "attention",
    "experts_linear": "experts",
    "experts_activate_backward": "experts",
    "void cutlass::device_kernel<cutlass::gemm::GroupProblemShape<cute::tuple<int, int, int>>>": "experts",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "experts",
    "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::Policy900>": "experts",
    "loss_softmax_gradient": "head and loss",
    "adamw_update": "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer",
    "embedding_add_runs": "embedding",
    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float>": "embedding",
    "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NTT": "dense projections",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64": "dense projections",
    "triton_red_fused__to_copy_add_mul_pow_rsqrt_3": "norms and elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "norms and elementwise",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>": OTHER,
    "Memcpy HtoD (Pinned -> Device)": OTHER,
    "something_else": OTHER,
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert classify(name) == NAMES[name]


def test_a_scope_says_more_than_a_name() -> None:
    product = "nvjet_sm90_tst_128x256"
    assert classify(product, ["aten::mm", "CrossEntropy"]) == "head and loss"
    assert classify(product, ["aten::mm", "p828::swiglu_down_backward"]) == "experts"
    assert classify(product, ["aten::mm"]) == "dense projections"
    assert classify("triton_poi_fused_0", ["Optimizer.step#AdamW.step"]) == "optimizer"


def test_times_are_added_up_a_micro_batch() -> None:
    work = [
        Work("nvjet_1", (), 3000.0, 2), Work("nvjet_1", ("CrossEntropy",), 1000.0, 2),
        Work("nvjet_1", (), 1000.0, 2), Work("Memset (Device)", (), 500.0, 1),
    ]  # fmt: skip
    found = summarise(work, step_seconds=0.008, micro_batches=2)
    assert found["ms"] == 4.0
    assert {part: ms for part, ms in found["parts"].items() if ms} == {
        "dense projections": 2.0, "head and loss": 0.5, OTHER: 0.25,
    }  # fmt: skip
    assert found["kernels"][0] == {"name": "nvjet_1", "part": "dense projections", "ms": 2.0, "times": 2.0}
    assert [kernel["ms"] for kernel in found["kernels"]] == [2.0, 0.5, 0.25]


def test_a_step_on_a_cpu() -> None:
    """Every matrix product of the engine's own step is found where it belongs."""
    train = TrainConfig(micro_batch_size=2, gradient_accumulation=1, device="cpu")
    config = Config(model=tiny_config(), data=DataConfig(sequence_length=16), train=train)
    step = OwnStep(config, "balanced")  # every expert has tokens
    step.run()
    found = break_down(step.run_traceably, 1.0, 1, torch.device("cpu"))
    assert 0 < sum(found["parts"].values()) <= found["ms"]

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        step.run()
    products = Counter(
        classify(work.name, work.scopes)
        for work in cpu_work(list(profiler.events()))
        if work.name in ("aten::mm", "aten::addmm_")
    )
    layers, experts = config.model.num_hidden_layers, config.model.n_routed_experts
    forward_and_two_gradients = 3
    assert products == {
        "experts": layers * experts * 2 * forward_and_two_gradients,
        # Of qkv, the attention's output, the router, and the shared experts' three.
        "dense projections": layers * 6 * forward_and_two_gradients,
        "head and loss": forward_and_two_gradients,
    }
