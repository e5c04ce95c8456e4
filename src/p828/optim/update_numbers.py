"""What an update does to the weights, from a sample of each parameter's numbers; and to the balance bias.

A pass over all weights would take as long as the update itself. So the norms here are those of a fixed sample of every
parameter, scaled to its size: exact for a parameter of up to SAMPLED numbers, else within a few percent. All of it
stays on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from p828.kernels.adamw import join_float32
from p828.model.transformer import Transformer
from p828.optim.balance import bias_numbers, stacked_biases
from p828.optim.parts import ByPart

SAMPLED = 2048  # numbers of a parameter, or of what a rank holds of it


class Held(NamedTuple):
    """What a rank updates of a parameter. The tensors always lie in the same place."""

    name: str
    weight: Tensor
    """What the layers compute with, flat."""
    master: Tensor | None = None
    """The float32 master, or as int16 the low bits that it has beyond `weight`; None where the weight is the master."""


class UpdateNumbers:
    """Measures an update between `begin` and `finish`. X counts parts, L layers, P what is held, N sampled numbers."""

    def __init__(
        self,
        model: Transformer,
        held: Sequence[Held],
        parts: Sequence[str],
        over_ranks: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda sums: sums,
    ) -> None:
        """`held` is what this rank updates; `over_ranks` adds the ranks' sums by name, where a rank has only some."""
        self.model, self._over_ranks = model, over_ranks
        self._device = model.layers[0].mlp.gate.e_score_correction_bias.device
        kinds = {_kind(one) for one in held}
        self._groups = [_Group([one for one in held if _kind(one) == kind]) for kind in sorted(kinds, key=str)]
        names = [name for group in self._groups for name in group.names]
        lengths = [length for group in self._groups for length in group.lengths]
        lengths_P, counts_P = (torch.tensor(n, device=self._device) for n in (lengths, [*map(_count, lengths)]))
        self._has_masters = any(one.weight.dtype == torch.bfloat16 for one in held)
        self._by_part = ByPart(names, parts, self._device)
        self._scale_P = lengths_P / counts_P
        self._numbers_X = self._by_part.sum(lengths_P)
        layers = range(len(model.layers))
        is_sink = [[name.endswith(f"layers.{layer}.self_attn.sinks") for name in names] for layer in layers]
        self._is_sink_LP = torch.tensor(is_sink, dtype=torch.bool, device=self._device).view(len(layers), len(names))

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the weights and biases of before the update."""
        self._before, self._biases_LE = self._sample(), stacked_biases(self.model)

    @torch.no_grad()
    def finish(self, loads_LE: Tensor) -> dict[str, Tensor]:
        """What the update did, by the names of a step's record: (X,) by part, (L,) by layer.

        `loads_LE` counts the whole step: all micro-batches, all ranks.
        """
        (weights_PN, masters_PN), (before_PN, masters_before_PN) = self._sample(), self._before
        change_PN = masters_PN - masters_before_PN
        is_changed_PN, has_low_bits_PN = weights_PN != before_PN, masters_before_PN != before_PN
        found = (masters_PN * masters_PN, change_PN * change_PN, is_changed_PN.float(), has_low_bits_PN.float())
        found_4PN = torch.stack(found)
        sums = {
            "by_part": self._by_part.sum(found_4PN.sum(dim=2) * self._scale_P),
            "numbers_X": self._numbers_X,
            "sinks_L": masters_PN.sum(dim=1).where(self._is_sink_LP, 0.0).sum(dim=1),
        }
        sums = dict(self._over_ranks(sums))
        squares_X, squares_of_change_X, changed_X, low_bits_X = sums["by_part"]
        norms_X = squares_X.sqrt()
        numbers = {
            "weight_norms": norms_X,
            "update_ratios": squares_of_change_X.sqrt() / norms_X.clamp_min(torch.finfo(torch.float32).tiny),
            "changed": changed_X / sums["numbers_X"],
            **bias_numbers(self._biases_LE, stacked_biases(self.model), loads_LE),
        }
        if self._has_masters:
            numbers["low_bits"] = low_bits_X / sums["numbers_X"]
        if self.model.config.attention_sinks:
            numbers["sink_mean"] = sums["sinks_L"] / self.model.config.num_attention_heads
        return numbers

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Weights as the layers have them, and masters: float32 (P, N) each, 0 where a parameter has fewer numbers."""
        samples = [group.sample(self._device) for group in self._groups]
        if not samples:
            nothing = torch.zeros(0, SAMPLED, device=self._device)
            return nothing, nothing
        weights, masters = zip(*samples, strict=True)
        return torch.cat(weights), torch.cat(masters)


class _Group:
    """Parameters whose weights have one dtype and whose masters are of one kind: one concatenation takes them all."""

    def __init__(self, held: Sequence[Held]) -> None:
        self.names, self.lengths = [one.name for one in held], [one.weight.numel() for one in held]
        self._weights = _views([one.weight for one in held])
        self._masters = _views([one.master for one in held if one.master is not None])

    def sample(self, device: torch.device) -> tuple[Tensor, Tensor]:
        weights_PN = torch.cat(self._weights).view(-1, SAMPLED).to(device)
        if not self._masters:
            return weights_PN.float(), weights_PN.float()
        masters_PN = torch.cat(self._masters).view(-1, SAMPLED).to(device)
        if masters_PN.dtype == torch.int16:
            masters_PN = join_float32(weights_PN, masters_PN)
        return weights_PN.float(), masters_PN


def _kind(held: Held) -> tuple[torch.dtype, torch.dtype | None]:
    return held.weight.dtype, None if held.master is None else held.master.dtype


def _distance(numbers: int) -> int:
    """From one sampled number to the next: odd, so that a sample of a matrix does not stay in one column."""
    apart = -(-numbers // SAMPLED)
    return apart + (apart + 1) % 2


def _count(numbers: int) -> int:
    return -(-numbers // _distance(numbers))


def _views(flats: Sequence[Tensor]) -> list[Tensor]:
    """Up to SAMPLED numbers of each tensor, evenly spaced; zeros follow where there are fewer."""
    views = []
    for flat in flats:
        views.append(flat.detach()[:: _distance(len(flat))])
        if (missing := SAMPLED - _count(len(flat))) > 0:
            views.append(flat.new_zeros(missing))
    return views
