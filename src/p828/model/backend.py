"""Which code computes a model, for a device and an arithmetic."""

import torch

from p828.config import ModelConfig
from p828.errors import ConfigError


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
