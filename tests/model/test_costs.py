"""Parameter and FLOP counts against the real modules and torch's own counter."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from p828 import config
from p828.model.costs import count_parameters, flops_by_part, flops_per_token, parameters_by_part, training_flops
from p828.model.loss import linear_cross_entropy
from p828.model.transformer import Transformer
from tiny import tiny_config, tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "no sinks": {"attention_sinks": False},
    "qk norm": {"use_qk_norm": True},
    "no shared": {"n_shared_experts": 0},
    "two shared": {"n_shared_experts": 2},
    "product": {"hidden_act": "swiglu_of_product"},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 1},
    "one layer, one expert": {"num_hidden_layers": 1, "n_routed_experts": 1, "num_experts_per_tok": 1},
    "all at once": {
        "tie_word_embeddings": True,
        "use_qk_norm": True,
        "n_shared_experts": 3,
        "hidden_act": "swiglu_of_product",
        "num_hidden_layers": 3,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_modules(variant: str) -> None:
    model_config = tiny_config(**VARIANTS[variant])
    total, active = count_parameters(model_config)
    with torch.device("meta"):
        model = Transformer(model_config)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    one_expert = sum(p[0].numel() for p in model.model.layers[0].mlp.experts.parameters())
    unused = model_config.n_routed_experts - model_config.num_experts_per_tok
    assert active == total - model_config.num_hidden_layers * unused * one_expert


PARTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp.gate": "router",
    "mlp.experts": "routed_experts",
    "mlp.shared_experts": "shared_experts",
    "norm": "norms",
    "lm_head": "head",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_by_part_are_those_of_the_modules(variant: str) -> None:
    model_config = tiny_config(**VARIANTS[variant])
    with torch.device("meta"):
        model = Transformer(model_config)
    counted = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in model.named_parameters():
        part = next(part for word, part in PARTS.items() if word in name)
        counted[part] += parameter.numel()
    assert parameters_by_part(model_config)._asdict() == counted


# Millions of parameters that each preset is documented to have (total, active), and the last digit's worth.
PRESETS = {"60m": (60.8, None, 0.1), "800m": (812, 358, 1), "planned": (4400, None, 100)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_their_documented_size(preset: str) -> None:
    documented_total, documented_active, digit = PRESETS[preset]
    model_config = config.with_vocabulary(config.load(preset)).model
    total, active = count_parameters(model_config)
    assert abs(total / 1e6 - documented_total) < digit
    assert documented_active is None or abs(active / 1e6 - documented_active) < digit
    with torch.device("meta"):
        assert total == sum(parameter.numel() for parameter in Transformer(model_config).parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_against_the_counter_of_torch(variant: str) -> None:
    """Exactly the counter's number, but for the half of attention that is masked, which it counts in full.

    The reference backend multiplies every query with every key; the embedding's look-up is no product for either.
    """
    rows, length = 2, 6
    model = tiny_model(attention_backend="reference", **VARIANTS[variant])
    tokens = torch.randint(97, (rows, length))
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens).hidden_BSH.flatten(0, 1)
        linear_cross_entropy(hidden, model.head_weight, tokens.flatten()).backward()
    c = model.config
    masked_half = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length
    assert counter.get_total_flops() == rows * length * (flops_per_token(c, length) + masked_half)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_of_documents_are_those_of_each_by_itself(variant: str) -> None:
    """By torch's counter, which counts every pair of a document, the masked ones too."""
    model, lengths = tiny_model(attention_backend="reference", **VARIANTS[variant]), (2, 5, 9)
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            tokens = torch.randint(97, (1, length))
            hidden = model(tokens).hidden_BSH.flatten(0, 1)
            linear_cross_entropy(hidden, model.head_weight, tokens.flatten()).backward()
    assert counter.get_total_flops() == training_flops(model.config, sum(lengths), sum(n**2 for n in lengths))


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_by_part_are_those_of_the_modules(variant: str) -> None:
    """Forward passes alone, a third of it all; every pair of tokens is counted, masked or not."""
    model, length = tiny_model(attention_backend="reference", **VARIANTS[variant]), 6
    tokens = torch.randint(97, (1, length))
    with FlopCounterMode(display=False, depth=9) as counter, torch.no_grad():
        linear_cross_entropy(model(tokens).hidden_BSH[0], model.head_weight, tokens[0])
    counted = dict.fromkeys(PARTS.values(), 0)
    counted["head"] = counter.get_total_flops()
    for name, operations in counter.get_flop_counts().items():
        found = [part for word, part in PARTS.items() if name.endswith(word)]
        for part in found:
            counted[part] += sum(operations.values())
            counted["head"] -= sum(operations.values())
    forward = {part: 3 * flops for part, flops in counted.items()}
    assert flops_by_part(model.config, length, length**2)._asdict() == forward
