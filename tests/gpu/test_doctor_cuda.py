"""`p828 doctor`'s parts on a GPU: every kernel's self-test passes, and finds a kernel that is wrong."""

import pytest
import torch

from p828.config import load
from p828.doctor.gpu import check_gpus
from p828.doctor.kernels.self_tests import EVERYWHERE, IN_TRITON, check_all_kernels, check_kernels, tried
from p828.doctor.model import check_model
from p828.doctor.rates import check_rates


def test_every_kernel_passes(cuda: torch.device) -> None:
    found = list(check_kernels(cuda))
    assert len(found) == len(EVERYWHERE) + len(IN_TRITON)
    assert [check for check in found if check.status != "ok"] == []


def test_they_pass_on_every_further_gpu(cuda: torch.device) -> None:
    for number in range(torch.cuda.device_count()):
        (check,) = check_all_kernels(torch.device("cuda", number))
        assert (check.name, check.status) == (f"gpu {number} kernels", "ok")


def test_a_missing_sink_gradient_is_named(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from p828.kernels.attention import flash_triton  # with Triton, which a CPU's machine does not have

    monkeypatch.setattr(flash_triton, "backward_sinks", lambda sinks_N, *rest: torch.zeros_like(sinks_N))
    check = tried("attention", EVERYWHERE["attention"], cuda, torch.bfloat16)
    assert check.status == "failure"
    assert check.text.startswith("gradient of sinks off by 1")


def test_the_gpu_and_its_rates_are_told(cuda: torch.device) -> None:
    names = [check.name for check in check_gpus(None)]
    assert names[:3] == ["driver", "gpu 0", "gpu 0 memory"]
    rates = check_rates(torch.device("cuda", 0))
    assert [check.name for check in rates] == ["gpu 0 matmul", "gpu 0 memory rate", "gpu 0 host copy"]
    model = check_model(load("800m"), cuda)
    assert "on p828's kernels, as CUDA graphs" in model.text
