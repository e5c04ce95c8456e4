"""Initial weights made on the GPU are those that are made on the host."""

import pytest
import torch

from p828.model import init as initialisation
from p828.model.init import initialise
from p828.model.transformer import Transformer
from tiny import tiny_config


@pytest.mark.parametrize("chunk", [initialisation.CHUNK, 64])
def test_the_same_values(cuda: torch.device, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also of sizes that are no multiple of sixteen, in as many pieces as there may be."""
    monkeypatch.setattr(initialisation, "CHUNK", chunk)
    config = tiny_config(hidden_size=24, vocab_size=97, n_routed_experts=5)
    on_host, on_gpu = Transformer(config), Transformer(config).to(cuda)
    initialise(on_host, 3)
    initialise(on_gpu, 3)
    for name, value in on_host.state_dict().items():
        assert torch.equal(on_gpu.state_dict()[name].cpu(), value), name
