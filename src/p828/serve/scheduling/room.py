"""Memory of the key-value cache, before it is taken."""

import torch

from p828.config import ModelConfig
from p828.errors import ConfigError
from p828.system.host_memory import free_host_bytes


def cache_bytes(config: ModelConfig, slots: int, max_length: int, dtype: torch.dtype) -> int:
    """Of keys and values in `dtype`; the decoder has one slot more, for rows that stand for no sequence."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return (slots + 1) * max_length * token


def check_cache(config: ModelConfig, slots: int, max_length: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError for a cache that the device's free memory does not hold."""
    needed = cache_bytes(config, slots, max_length, dtype)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    if needed > free:
        where = "GPU" if device.type == "cuda" else "machine"
        raise ConfigError(
            f"--slots {slots} of {max_length:,} tokens take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free "
            f"on this {where}: fewer --slots or a shorter --context is accepted"
        )
