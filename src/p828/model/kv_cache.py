"""Keys and values of the tokens a model has already seen."""

import torch
from torch import Tensor

from p828.config import ModelConfig


class LayerCache:
    """One layer's part of a `KVCache` during one forward pass."""

    def __init__(self, cache: "KVCache", layer: int, positions_BS: Tensor) -> None:
        self._cache, self._layer, self._positions_BS = cache, layer, positions_BS

    def append(self, k_BSGD: Tensor, v_BSGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the tokens' keys and values at their positions; return all slots in use, (B, C, G, D) each."""
        rows_B1 = torch.arange(k_BSGD.shape[0], device=k_BSGD.device)[:, None]
        keys_BCGD, values_BCGD = self._cache.keys[self._layer], self._cache.values[self._layer]
        keys_BCGD[rows_B1, self._positions_BS] = k_BSGD
        values_BCGD[rows_B1, self._positions_BS] = v_BSGD
        return keys_BCGD[:, : self._cache.used], values_BCGD[:, : self._cache.used]


class KVCache:
    """Room for `max_length` tokens of every sequence. A token's slot is its position.

    Sequences may be of unequal length. A shorter prompt's padding is written at positions after its last token;
    generation overwrites them before a query reads them.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, max_length, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.max_length = max_length
        self.used = 0

    def extend(self, length: int) -> None:
        """Bring `length` slots into use. Raises ValueError past `max_length`."""
        if length > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, not {length}")
        self.used = max(self.used, length)

    def layer(self, index: int, positions_BS: Tensor) -> LayerCache:
        return LayerCache(self, index, positions_BS)

    def select(self, sequences: Tensor) -> None:
        """Keep only the sequences with these indices (int64), in this order."""
        self.keys = [keys_BCGD[sequences] for keys_BCGD in self.keys]
        self.values = [values_BCGD[sequences] for values_BCGD in self.values]
