"""A kernel's results beside those of its twin, and where the kernel is tried."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p828.doctor.check import Check

# Of the norm: float32 sums of at most some hundred terms differ by less; bfloat16 carries 2^-9 = 2e-3 for each rounding
# of inputs, intermediate values and output.
FLOAT32, BFLOAT16 = 1e-5, 1e-2
SEED = 828
REMEDY = (
    "a run here would compute something else: try another version of PyTorch or Triton, remove ~/.triton/cache, and on "
    "another machine, as the card may be damaged"
)


@dataclass(frozen=True)
class Place:
    """The device and the dtype that a kernel is tried in; inputs come from a generator of its own."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    @property
    def tolerance(self) -> float:
        return BFLOAT16 if self.dtype == torch.bfloat16 else FLOAT32

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers on the CPU in float64, each of which the dtype has."""
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype).double()

    def leaf(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy on the device that collects its gradient, in the dtype unless another is given."""
        return values.detach().to(self.device, dtype or self.dtype, copy=True).requires_grad_()


@dataclass(frozen=True)
class Comparison:
    what: str
    actual: Tensor | None
    expected: Tensor | None
    tolerance: float
    """Of the difference's norm, as a fraction of the expected norm, or absolute where that is below 1."""
    is_gradient: bool = False
    """Whether it is the gradient of what is named."""

    @property
    def distance(self) -> float:
        """The difference's norm as a fraction; infinite where there is no result, or another shape, or not finite."""
        if self.actual is None or self.expected is None or self.actual.shape != self.expected.shape:
            return torch.inf
        actual, expected = (x.detach().double().cpu() for x in (self.actual, self.expected))
        distance = ((actual - expected).norm() / expected.norm().clamp_min(1.0)).item()
        return distance if distance == distance else torch.inf


def judged(name: str, comparisons: Iterable[Comparison]) -> Check:
    """`ok` if every result is near its twin's; else which is not."""
    found = list(comparisons)
    wrong = [one for one in found if one.distance > one.tolerance]
    if wrong:
        shown = "; ".join(f"{_named([one])} off by {one.distance:.2g} (at most {one.tolerance:.0e})" for one in wrong)
        return Check(name, "failure", shown, REMEDY)
    largest = max((one.distance for one in found), default=0.0)
    near = f"within {largest:.1g} of" if largest else "equal to"
    return Check(name, "ok", f"{_named(found)}: {near} float64")


def gradients(
    names: Iterable[str], ours: Iterable[Tensor | None], twins: Iterable[Tensor | None], tolerance: float
) -> list[Comparison]:
    """The gradients that a backward pass has left on the two sides' leaves."""
    return [
        Comparison(name, None if our is None else our.grad, None if twin is None else twin.grad, tolerance, True)
        for name, our, twin in zip(names, ours, twins, strict=True)
    ]


def _named(comparisons: Sequence[Comparison]) -> str:
    results = [one.what for one in comparisons if not one.is_gradient]
    of = [one.what for one in comparisons if one.is_gradient]
    gradients = f"gradient{'s' if len(of) > 1 else ''} of {', '.join(of)}" if of else ""
    return ", ".join([*results, *([gradients] if gradients else [])])
