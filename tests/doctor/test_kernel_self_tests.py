"""The self-tests pass on sound kernels and name what is wrong with damaged ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from p828.doctor.kernels import decode, layers, update
from p828.doctor.kernels.comparison import Comparison, Place, judged
from p828.doctor.kernels.self_tests import EVERYWHERE, IN_TRITON, check_kernels, tried
from p828.kernels.attention import flash_cpu
from p828.kernels.moe.grouped_gemm_cpu import GroupedLinear

CPU = torch.device("cpu")
FLOAT32 = torch.float32


def test_all_pass_on_this_cpu() -> None:
    found = list(check_kernels(CPU))
    assert len(found) == len(EVERYWHERE)
    assert [check for check in found if check.status != "ok"] == []
    sinks = next(check for check in found if check.name == "kernel attention")
    assert "sinks" in sinks.text
    experts = next(check for check in found if check.name == "kernel routed experts")
    assert "the empty expert" in experts.text


@pytest.mark.parametrize("name", ["norm", "router", "shared experts"])
def test_those_of_a_gpu_compare_what_is_equal(name: str) -> None:
    """On a CPU they compare plain PyTorch in float32 with the twin."""
    assert tried(name, IN_TRITON[name], CPU, FLOAT32).status == "ok"


def test_a_missing_sink_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = flash_cpu.FlashAttentionCPU.backward

    def without_sinks(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv, dsinks_N, mask = backward(ctx, grad_BNSD)
        assert dsinks_N is not None
        return dq, dk, dv, torch.zeros_like(dsinks_N), mask

    monkeypatch.setattr(flash_cpu.FlashAttentionCPU, "backward", staticmethod(without_sinks))
    check = tried("attention", layers.attention, CPU, FLOAT32)
    assert check.status == "failure"
    assert check.text.startswith("gradient of sinks off by 1")
    assert check.remedy


def test_a_gradient_of_the_empty_expert_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = GroupedLinear.backward

    def with_noise(ctx: Any, dy_RB: Tensor) -> tuple[Tensor, Tensor, None]:
        dx_RA, dweight_EBA, _ = backward(ctx, dy_RB)
        dweight_EBA[layers.EMPTY] += 1e-6
        return dx_RA, dweight_EBA, None

    monkeypatch.setattr(GroupedLinear, "backward", staticmethod(with_noise))
    check = tried("experts", layers.routed_experts, CPU, FLOAT32)
    assert check.status == "failure"
    assert check.text.startswith("gradient of the empty expert off by")


def test_attention_to_the_next_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost mask: the twin sees documents, the kernel all that is before."""
    attend = flash_cpu.FlashAttentionCPU.forward

    def without_mask(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
        return attend(ctx, q, k, v, sinks, None)

    monkeypatch.setattr(flash_cpu.FlashAttentionCPU, "forward", staticmethod(without_mask))
    assert tried("attention", layers.attention, CPU, FLOAT32).text.startswith("output off by")


@pytest.mark.parametrize(
    "module, function, test",
    [
        (update, "softmax_gradient_", update.cross_entropy),
        (update, "add_embedding_gradient_", update.embedding),
        (update, "adamw_", update.adamw),
        (decode.cpu, "attend", decode.attention),
        (decode.cpu, "rotate", decode.attention),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_slight_error_of_any_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, module: Any, function: str, test: Callable[[Place], list[Comparison]]
) -> None:
    right = getattr(module, function)

    def wrong(first: Any, *rest: Any) -> Any:
        """Its result, or the first of what it changes, 1 in 1,000 too large."""
        found = right(first, *rest)
        changed = found if isinstance(found, Tensor) else first
        (changed if isinstance(changed, Tensor) else changed.weight).mul_(1.001)
        return found

    monkeypatch.setattr(module, function, wrong)
    assert tried("it", test, CPU, FLOAT32).status == "failure"


def test_a_kernel_that_does_not_run_is_a_failure_with_its_error() -> None:
    def broken(place: Place) -> list[Comparison]:
        raise TypeError("cannot\n   compile")

    check = tried("it", broken, CPU, FLOAT32)
    assert (check.status, check.text) == ("failure", "does not run: TypeError: cannot compile")


def test_what_is_no_number_or_not_there_is_not_near() -> None:
    one = torch.ones(2)
    for actual in (None, torch.ones(3), torch.full((2,), torch.nan), torch.full((2,), torch.inf)):
        assert judged("it", [Comparison("result", actual, one, 1e9)]).status == "failure"
    assert judged("it", [Comparison("result", one, one, 0.0)]).status == "ok"
