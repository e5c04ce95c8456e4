"""Which code computes a model: the only place that asks what a device and a dtype allow.

Everything that depends on the device or the dtype is decided here: the layers ask for their own backend, the engine
whether a micro-batch can become a CUDA graph, and `inference.load` which arithmetic a loaded model gets. Arguments are
constants to `torch.compile`, and so are the answers: no decision is part of a compiled graph.

The Triton kernels of a layer compute in bfloat16 on CUDA. Three functions in `p828.kernels` choose between their Triton
form and its plain twin by themselves, from where the tensor lies: `adamw.adamw_`, `cross_entropy.softmax_gradient_` and
`embedding.add_embedding_gradient_`. The two forms do the same in any dtype, the callers are in several folders, and
`kernels` is below `model` and cannot ask it.
"""

from dataclasses import replace
from typing import Literal

import torch

from p828.config import ModelConfig
from p828.errors import ConfigError
from p828.kernels.decode.float16_cpu import has_float16_products

AttentionBackend = Literal["reference", "flash_cpu", "flash_triton"]
ExpertsBackend = Literal["triton", "grouped_mm", "loop"]

TRITON_ACTIVATIONS = ("swiglu", "swiglu_of_product")
"""Values of `model.hidden_act` that the experts' Triton kernels compute. Any other runs on plain code."""
TRITON_SCORES = ("sigmoid", "softmax")
"""Values of `model.scoring_func` that the kernel which routes a decoding step computes."""
LOSS_CHUNK_TOKENS = {
    "cpu": 256,  # so that a chunk of a small vocabulary stays in the cache
    "cuda": 4096,  # below that the products with the head do not fill an H100
}
LOSS_COLUMNS = {
    "cpu": 1,
    "cuda": 64,  # rows of logits that begin off 16 bytes, as with GPT-2's 50,257, make all three products slow
}
RANDOM_BLOCK = {
    "cpu": 2**16,  # so that a block's operations stay in the cache
    "cuda": 2**23,  # so that an operation takes longer than its start; about 300 MB of memory meanwhile
}


def uses_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton kernels compute in this dtype: norms and the router's logits ask no more."""
    return device.type == "cuda" and dtype == torch.bfloat16


def attention_backend(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """`flash_triton` takes documents' bounds, the other two a mask."""
    if model.attention_backend == "reference":
        return "reference"
    if device.type != "cuda":
        return "flash_cpu"
    if model.attention_backend == "auto" and not uses_triton(device, dtype):
        return "reference"
    return "flash_triton"


def experts_backend(hidden_act: str, device: torch.device, dtype: torch.dtype, drops: bool) -> ExpertsBackend:
    """For routed and shared experts. `drops`: dropout is at work, which no kernel has.

    `grouped_mm` and `loop` are plain code for any activation. `loop` makes the host wait for the experts' loads.
    """
    if not uses_triton(device, dtype):
        return "loop"
    return "triton" if hidden_act in TRITON_ACTIVATIONS and not drops else "grouped_mm"


def router_chooses_in_triton(device: torch.device) -> bool:
    """Whether a kernel chooses the experts; scores are float32 whatever layers compute in.

    The kernel is given the finished scores, so it takes those of any `model.scoring_func`, which plain code computes.
    """
    return device.type == "cuda"


def allows_cuda_graph(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether forward and backward pass only start kernels: no loads are asked for, no random numbers drawn."""
    attention = attention_backend(model, device, dtype)
    experts = experts_backend(model.hidden_act, device, dtype, drops=model.dropout > 0)
    return attention == "flash_triton" and experts == "triton"


def has_decode_kernels(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every operation of a decoding step has a kernel: a step is a CUDA graph then, and plain code else."""
    attention = attention_backend(model, device, dtype)
    experts = experts_backend(model.hidden_act, device, dtype, drops=False)
    return attention == "flash_triton" and experts == "triton" and model.scoring_func in TRITON_SCORES


def decode_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a decoder computes in, of a model that everything else computes in `dtype`.

    On a CPU that is float32, with weights as the model stores them: one without matrix units for bfloat16 takes many
    times as long in it. Without products of weights in half of float32's bytes it stays `dtype`.
    """
    return torch.float32 if device.type == "cpu" and has_float16_products() else dtype


def remarks(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A line for each setting that has no kernel where the rest of the model has."""
    if uses_triton(device, dtype) and model.hidden_act not in TRITON_ACTIVATIONS:
        return [f'model.hidden_act = "{model.hidden_act}": no GPU kernel computes it; the experts run on plain code']
    return []


def adds_products_in_float32(device: torch.device) -> bool:
    """Whether a product of bfloat16 matrices can be added to a float32 sum without being rounded before."""
    return device.type == "cuda"


def check_widths(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError naming what the GPU's kernels do not take: they compute in bfloat16, 16 bytes at a time."""
    if device.type != "cuda":
        return
    if dtype == torch.float32:
        if model.attention_backend == "flash":
            raise ConfigError(
                'model.attention_backend = "flash" computes in bfloat16 on a GPU, not in train.dtype = "float32"'
            )
        return
    for key in ("head_dim", "hidden_size", "moe_intermediate_size"):
        width = getattr(model, key)
        if width % 8:
            raise ConfigError(f"model.{key} = {width}: in bfloat16 on a GPU, a multiple of 8 is accepted")
    if model.head_dim > 256:
        raise ConfigError(f"model.head_dim = {model.head_dim}: in bfloat16 on a GPU, at most 256 is accepted")


def computable(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[ModelConfig, torch.dtype]:
    """The model and dtype as given, or plain code in float32 where this GPU's kernels do not take the model.

    For a model that is only used: it may have been trained on another device.
    """
    try:
        check_widths(model, device, dtype)
    except ConfigError:
        return replace(model, attention_backend="reference"), torch.float32
    return model, dtype
