"""The code that an export carries, on a GPU: each kind of attention, with its gradients, against p828 on a CPU.

All experts are chosen (K = E), so that no rounding sends a token to another one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from exported import difference, in_transformers
from p828.model.loss import linear_cross_entropy
from tiny import tiny_model

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 4}
# Both sides are float32. PyTorch's compiled flex_attention takes exp2 of scores that it scaled by log2(e) before,
# and a GPU adds up in another order; errors pass through two layers, and back.
TOLERANCE = 5e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_loss_and_gradients_with_sinks(implementation: str, tmp_path: Path, cuda: torch.device) -> None:
    model = tiny_model(**SIZES)
    tokens = torch.randint(97, (2, 33))
    hidden = model(tokens).hidden_BSH[:, :-1].flatten(0, 1)
    expected = linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten()) / 64
    expected.backward()
    exported = in_transformers(model, tmp_path, attn_implementation=implementation).to(cuda).train()
    loss = exported(tokens.to(cuda), labels=tokens.to(cuda)).loss
    loss.backward()
    assert difference(loss.cpu(), expected) < TOLERANCE
    gradients = {name: parameter.grad for name, parameter in exported.named_parameters()}
    for name, parameter in model.named_parameters():
        assert difference(gradients[name].cpu(), parameter.grad) < TOLERANCE, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_static_cache_continues_alike(implementation: str, tmp_path: Path, cuda: torch.device) -> None:
    model = tiny_model(**SIZES)
    exported = in_transformers(model, tmp_path, attn_implementation=implementation).to(cuda)
    tokens = torch.randint(97, (2, 9), device=cuda)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    dynamic = exported.generate(tokens, **options)
    static = exported.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(static, dynamic)
