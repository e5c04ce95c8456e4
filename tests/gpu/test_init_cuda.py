"""Initial weights made on the GPU are those that are made on the host."""

import pytest
import torch

from p828.model.init import initialise
from p828.model.random_normal import fill_normal_, inverse_normal, make_key
from p828.model.transformer import Transformer
from tiny import tiny_config


def test_the_same_weights(cuda: torch.device) -> None:
    config = tiny_config(hidden_size=24, vocab_size=97, n_routed_experts=5)
    on_host, on_gpu = Transformer(config), Transformer(config).to(cuda)
    initialise(on_host, 3)
    initialise(on_gpu, 3)
    for name, value in on_host.state_dict().items():
        assert torch.equal(on_gpu.state_dict()[name].cpu(), value), name


@pytest.mark.parametrize("block", [None, 1000])
@pytest.mark.parametrize("start", [0, 2**33 - 500])
def test_the_same_bits(cuda: torch.device, start: int, block: int | None) -> None:
    """Of many numbers, so that those in the tails are among them."""
    count = 100_003 if block else 3_000_001
    on_host, on_gpu = torch.empty(count), torch.empty(count, device=cuda)
    for values in (on_host, on_gpu):
        fill_normal_(values, 0.0173, make_key(5, "weight"), start, block)
    assert torch.equal(on_gpu.cpu().view(torch.int32), on_host.view(torch.int32))


def test_the_same_inverse_everywhere(cuda: torch.device) -> None:
    """For evenly spaced bits, and for all of the two outermost 2^20."""
    ends = torch.arange(-(2**20), 2**20)
    random = torch.cat((torch.arange(-(2**31), 2**31, 1009), ends, 2**31 - 1 - ends.abs())).int()
    assert torch.equal(inverse_normal(random.to(cuda)).cpu(), inverse_normal(random))


def test_the_same_bits_under_deterministic_algorithms(cuda: torch.device) -> None:
    on_host, on_gpu = torch.empty(100_003), torch.empty(100_003, device=cuda)
    fill_normal_(on_host, 1.0, make_key(5, "weight"))
    torch.use_deterministic_algorithms(True)
    try:
        fill_normal_(on_gpu, 1.0, make_key(5, "weight"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(on_gpu.cpu(), on_host)
