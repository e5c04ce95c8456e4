"""The parts of a model that a run's records tell apart, and sums of the parameters' numbers by part."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PARTS = ("embedding", "attention", "sinks", "router", "routed_experts", "shared_experts", "norms", "head")
# What a parameter's name has in it, the first that fits: the norms of q and k are within the attention's names.
_MARKS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "norm": "norms",
    ".sinks": "sinks",
    ".self_attn.": "attention",
    ".gate.": "router",
    ".experts.": "routed_experts",
    ".shared_experts.": "shared_experts",
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to by its name. An embedding that is the head, too, is `embedding`."""
    return next(part for mark, part in _MARKS.items() if mark in name)


def parts_of(names: Iterable[str]) -> list[str]:
    """The parts that have a parameter among these names, in the order of `PARTS`."""
    found = {part_of(name) for name in names}
    return [part for part in PARTS if part in found]


class ByPart:
    """Sums over the parameters of each part. X counts the model's parts, P parameters, or what a rank holds of them."""

    def __init__(self, names: Sequence[str], parts: Sequence[str], device: torch.device) -> None:
        """For values of the P parameters `names`, in this order."""
        belongs = [[part_of(name) == part for name in names] for part in parts]
        self._belongs_XP = torch.tensor(belongs, dtype=torch.bool, device=device).view(len(parts), len(names))

    def sum(self, values_P: Tensor) -> Tensor:
        """(…, P) to float64 (…, X). What is not finite stays in its part."""
        values_1P = values_P.to(self._belongs_XP.device, torch.float64).unsqueeze(-2)
        return values_1P.where(self._belongs_XP, 0.0).sum(dim=-1)
