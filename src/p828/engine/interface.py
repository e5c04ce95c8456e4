"""What the loop asks of an engine, and the numbers that an engine returns for a step.

An engine collects a step's findings in a `StepStats`, tensors on the device with a name each. They go to the host in
one transfer, and `fetch` waits for that alone. It begins before the update of the weights, so that the host prepares
the next step meanwhile; after it in a step that measures the update, and where DeepSpeed's hooks make the step. What is
neither a load of the experts nor an attribute of `StepResult` goes into the step's record under its own name. So a new
number is one more line: in `StepStats.of` if it is found once a step, in `microbatch.micro_batch_totals` if it is a sum
over micro-batches, in `optim.update_numbers` if it is of the weights.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from p828.data.batch import Batch
from p828.model.transformer import Transformer
from p828.runs.tensors import Saveable, Tensors
from p828.runs.weights import Weights
from p828.system.timing import DeviceSpan

BY_PART = {
    "grad_norms",
    "weight_norms",
    "update_ratios",
    "changed",
    "low_bits",
}  # what is told for each part of the model

Number = float | list[float] | dict[str, float]
"""Of a step's record: a scalar, a list with an entry a layer, or an entry for each of `optim.parts.PARTS`."""


@dataclass(frozen=True)
class StepResult:
    """What a step found, on the host."""

    loss: float
    """Mean nats per target over the whole step."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    loads: list[list[int]]
    """Per layer, the tokens that each expert received."""
    further: dict[str, Number] = field(default_factory=dict)
    """Every other number, by its name in the step's record."""
    device_seconds: float | None = field(default=None, compare=False)
    """How long the device was at work in the step, as far as it is known."""

    @property
    def applied(self) -> bool:
        """False when the loss or the gradient was not finite: the engine left everything as it was then."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def numbers(self) -> dict[str, Number]:
        """What the step's record holds from the engine, but for the loads."""
        return {"loss": self.loss, "grad_norm": self.grad_norm, **self.further}


class StepStats:
    """What a step found, on the device, over all micro-batches and all ranks."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` has "loss" and "grad_norm", scalars; "loads_LE"; and any number of further scalars and tensors (L,)
        by the names that they get in the step's record. All are equal on every rank, of any dtype that float64 holds.

        Their numbers are on the way to the host as soon as the device has them, while it goes on with what it is given
        afterwards. So the tensors may be set to zero for the next step before `fetch`.
        """
        packed, self._shapes = pack(tensors), shapes_of(tensors)
        self._host = packed
        self._arrival: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._host = torch.empty_like(packed, device="cpu", pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    @classmethod
    def of(
        cls,
        model: Transformer,
        totals: Mapping[str, Tensor],
        grad_norm: Tensor,
        by_part: Mapping[str, Tensor] | None = None,
        measured: Mapping[str, Tensor] | None = None,
    ) -> "StepStats":
        """From the sums of `microbatch.micro_batch_totals` over the step and the gradients' global norm.

        `by_part` has `grad_norms`, (X,) of the model's parts, if they were found. `measured` is what
        `UpdateNumbers.finish` gives, None in a step that is not measured. Every engine calls this one after its update
        of the balance biases. The weights of `model` may be those before the update, and at ZeRO stage 3 are elsewhere.
        """
        further = dict(totals)
        entropy_L = further.pop("entropy_L")  # a mean over tokens, each of which counts in as many loads
        if measured is not None:
            choices_L = totals["loads_LE"].sum(dim=1).clamp_min(1)
            further["router_entropy"] = entropy_L * model.config.num_experts_per_tok / choices_L
        return cls({**further, "grad_norm": grad_norm, **(by_part or {}), **(measured or {})})

    def fetch(self, parts: Sequence[str] = (), span: DeviceSpan | None = None) -> StepResult:
        """All of it on the host, as soon as it is there.

        `parts` names the X entries of what is told by part. `span` ends here.
        """
        started, left = time.perf_counter(), None
        if self._arrival is not None:
            left = torch.cuda.Event()
            left.record()
            self._arrival.synchronize()
        busy = None if span is None else span.end(time.perf_counter() - started, left)
        host = unpack(self._host, self._shapes)
        loads = [[int(load) for load in load_E] for load_E in host.pop("loads_LE").tolist()]
        loss, grad_norm = host.pop("loss").item(), host.pop("grad_norm").item()
        further: dict[str, Number] = {name: tensor.tolist() for name, tensor in host.items()}
        for name in BY_PART & further.keys():
            further[name] = dict(zip(parts, host[name].tolist(), strict=True))
        return StepResult(loss, grad_norm, loads, further, busy)


def pack(tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensors' numbers end to end in a float64 tensor (n,), to be sent over ranks or to the host in one go."""
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """What `unpack` needs to know of the tensors that were packed."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def unpack(packed: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """What `pack` was given, by name, as float64 views of its result."""
    parts = packed.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


class Engine(Protocol):
    """What a training step does to a model, on one device or several."""

    device: torch.device
    dtype: torch.dtype
    """What the layers compute in."""
    is_sharded: bool
    """Whether a rank has all weights of a layer only while the layer is at work."""

    @property
    def model(self) -> Transformer:
        """The model that is trained; at ZeRO stage 3 its weights are elsewhere."""
        ...

    @property
    def state_keys(self) -> tuple[str, ...]:
        """What a checkpoint holds of every parameter for the optimizer, as `optim.interface.Optimizer` says."""
        ...

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add the gradients of one micro-batch. `num_targets` counts the whole step's targets, on all ranks."""

    def step(self, learning_rate: float, is_measured: bool = False) -> StepResult:
        """Clip the gradients, update weights and balance bias, and begin the next step.

        Weights, bias and the optimizer's state stay as they are if the loss or the gradient is not finite.
        `is_measured`: also find what the update does to the weights, and what the routers score.
        """

    def model_for_evaluation(self) -> AbstractContextManager[Transformer]:
        """The model for forward passes. All ranks must make them at once, and the same number of them."""

    def model_for_any_passes(self) -> AbstractContextManager[Transformer]:
        """The model for forward passes of which each rank makes any number, or none. All ranks must enter at once.

        Its layers run as they were written (`inference.evaluate.uncompiled`). In the block no rank may call the others,
        and no error but a P828Error may be caught outside.
        """

    def state_dict(self) -> Mapping[str, Mapping[str, Saveable]]:
        """What a checkpoint needs from this rank, by file and name. The tensors are the engine's own, not copies."""

    def load_weights(self, weights: Weights) -> None:
        """Begin from these weights and balance biases, with the optimizer as it is. A rank reads what it holds."""

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from what any engine saved."""
