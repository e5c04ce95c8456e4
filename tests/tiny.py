"""Models small enough to test in milliseconds."""

from typing import Any

import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.kernels.adamw import join_float32
from p828.model.init import initialise
from p828.model.transformer import Transformer
from p828.optim.masters import Masters

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def tiny_model(**changes: Any) -> Transformer:
    """A model in which every parameter and bias matters: weights five times the initial ones, no zeros or ones."""
    model = Transformer(tiny_config(**changes))
    initialise(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(generator=generator)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(50 if name.endswith("gate.weight") else 5)
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def make_documents(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Document ids and positions, (rows, tokens) each, of rows packed with documents of these lengths."""
    documents = [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in rows]
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in rows]
    return torch.stack(documents), torch.stack(positions)


def joined(masters: Masters) -> dict[str, Tensor]:
    """float32 values on the CPU, by the parameter's name."""
    return {name: join_float32(*master).cpu() for name, master in masters.state_dict().items()}
