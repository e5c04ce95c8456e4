"""The same weights in transformers' attention with sinks give the same numbers.

Whole models are compared in tests/interchange/test_equal_logits.py.
"""

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from oracles import assert_near
from p828.config import RopeScaling
from p828.model.attention import Attention, AttentionMask
from p828.model.rope import inverse_frequencies, rotary
from tiny import tiny_config

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)
# Both sides are float32 and round at other places: errors of single parts (3e-6 with sums of at most a hundred terms,
# tests/oracles.py) pass through norms and products some ten times.
TOLERANCE = 2e-5


@pytest.mark.parametrize("backend", ["reference", "flash_cpu"])
@pytest.mark.parametrize("scaling", [RopeScaling(), YARN], ids=["rope", "yarn"])
def test_gpt_oss_attention_with_sinks(backend: str, scaling: RopeScaling) -> None:
    config = tiny_config(rope_scaling=scaling)
    ours = Attention(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else 0.2)
    gpt_oss_config = GptOssConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer_types=["full_attention"],
        attention_bias=False,
        attn_implementation="eager",
    )
    theirs = GptOssAttention(gpt_oss_config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())

    batch, length = 2, 19
    x, upstream = torch.randn(2, batch, length, config.hidden_size).unbind()
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, scaling)
    cos, sin = rotary(torch.arange(length).expand(batch, -1), frequencies, scaling.factor)

    def gradients(module: torch.nn.Module, out: Tensor) -> dict[str, Tensor | None]:
        out.backward(upstream)
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    actual = ours(x, (cos, sin), AttentionMask(backend, None, None))
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected, _ = theirs(x, (cos[:, :, 0], sin[:, :, 0]), causal)
    assert_near(actual, expected, TOLERANCE)
    our_gradients, their_gradients = gradients(ours, actual), gradients(theirs, expected)
    assert set(our_gradients) == set(their_gradients)
    for name, gradient in our_gradients.items():
        assert_near(gradient, their_gradients[name], TOLERANCE)
    assert their_gradients["sinks"] is not None
    assert their_gradients["sinks"].norm() > 1e-2
