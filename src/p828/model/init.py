"""Initial weights."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from p828.config import ModelConfig
from p828.model.transformer import Transformer

ROUTER_SHARE = 0.1  # a router that starts near even lets the balance bias, not chance, decide the first loads


CHUNK = 2**22  # numbers drawn at a time; what is drawn again and again into the same memory stays in the cache


def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter from `seed`, where it lies: the same values on every device.

    normal(0, initializer_range); what writes to the residual stream (attention's output, W2) is scaled by
    1 / sqrt(2 L) as in GPT-2; the router is a tenth of it; norms are one, sinks and balance bias zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, model.config, generator)


def initial_values(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What `initialise` fills a model with, one parameter after the other: name and float32 values on the CPU."""
    with torch.device("meta"):
        model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape)
        _fill(name, values, config, generator)
        yield name, values


def _fill(name: str, values: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    std = config.initializer_range
    if name.endswith("sinks"):
        nn.init.zeros_(values)
    elif name.endswith(("norm.weight", "layernorm.weight")):
        nn.init.ones_(values)
    elif name.endswith("gate.weight"):
        _draw(values, std * ROUTER_SHARE, generator)
    elif "o_proj" in name or "down_proj" in name:
        _draw(values, std / math.sqrt(2 * config.num_hidden_layers), generator)
    else:
        _draw(values, std, generator)


@torch.no_grad()
def _draw(values: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with normal numbers of the CPU's generator, by way of a small buffer if `values` are on a GPU."""
    if values.device.type != "cuda":
        values.normal_(0.0, std, generator=generator)
        return
    flat = values.view(-1)
    buffer = torch.empty(min(len(flat), CHUNK + 15), pin_memory=True)
    for begin, end in pieces(len(flat), CHUNK):
        flat[begin:end].copy_(buffer[: end - begin].normal_(0.0, std, generator=generator))


def pieces(count: int, chunk: int) -> list[tuple[int, int]]:
    """Begins and ends of pieces of `chunk` numbers, a multiple of 16; drawn one by one they are as drawn at once.

    PyTorch makes normal numbers sixteen at a time, where there are as many: the last piece has up to 15 more.
    """
    begins = list(range(0, max(count - 15, 1), chunk))
    return list(zip(begins, [*begins[1:], count], strict=True))
