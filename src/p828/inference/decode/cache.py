"""Keys and values of the sequences that are being continued, each in a slot of its own."""

import torch
from torch import Tensor

from p828.config import ModelConfig


class SlotCache:
    """Room for `max_length` tokens in each of `slots` slots, and in one more for rows that stand for no sequence.

    A token lies at its position. Whatever lies beyond a sequence's newest token is finite, and overwritten before it
    has a weight.
    """

    def __init__(
        self, config: ModelConfig, slots: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.slots, self.max_length = slots, max_length
        shape = (slots + 1, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        """Of each layer, (slots + 1, G, C, D)."""
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self._free = list(range(slots - 1, -1, -1))

    @property
    def scratch(self) -> int:
        """The slot of rows that stand for no sequence."""
        return self.slots

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free slot. Raises IndexError if there is none."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        assert 0 <= slot < self.slots, slot
        assert slot not in self._free, slot
        self._free.append(slot)

    def clear(self, slot: int) -> None:
        """Zeros, where something may not be finite.

        Beside a longer sequence, plain attention reads past the newest token with weight 0, which makes NaN of that.
        """
        for whole in (*self.keys, *self.values):
            whole[slot] = 0

    def copy(self, slot: int, others_T: Tensor, length: int) -> None:
        """The first `length` tokens of a slot, also in other slots (int64)."""
        for whole in (*self.keys, *self.values):
            whole[others_T, :, :length] = whole[slot, :, :length]

    def store(self, layer: int, slots_B1: Tensor, positions_BS: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> None:
        """Put tokens at their positions; slots and positions are int64."""
        self.keys[layer][slots_B1, :, positions_BS] = k_BSGD
        self.values[layer][slots_B1, :, positions_BS] = v_BSGD
