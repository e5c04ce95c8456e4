"""Where DeepSpeed keeps this rank's share of the float32 masters and of AdamW's moments.

DeepSpeed flattens the parameters of a group into one tensor and cuts that into a share for each rank; at stage 3 it
cuts every parameter by itself. Its own checkpoints are tied to that cut. A `Partition` says which numbers of which
parameter lie where, so that a share is saved and loaded by the parameter's name and place, at any stage and on any
number of ranks.

The attributes read here are DeepSpeed 0.19's, the same that its universal checkpoints and `safe_get_…` functions use.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from p828.runs.tensors import TensorShard


class Partition(NamedTuple):
    """The numbers of one parameter that a rank updates: consecutive in the flattened parameter."""

    name: str
    flat: Tensor
    """The float32 tensor that holds their masters. The optimizer's state of them is found by this tensor."""
    offset: int
    """The place of the first number in `flat`."""
    length: int
    start: int
    """The place of the first number in the flattened parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""

    def of(self, like_flat: Tensor) -> TensorShard:
        """The partition's numbers in `flat`, or in a tensor of the optimizer's state that is laid out like it."""
        values = like_flat.detach().view(-1).narrow(0, self.offset, self.length)
        return TensorShard(values, self.start, self.shape)

    def weight_in(self, parameter: Tensor, stage: int) -> Tensor:
        """The same numbers as the layers compute with them, flat: of `parameter`, or of what stage 3 keeps of it."""
        if stage == 3:
            return cast(Tensor, parameter.ds_tensor).detach().view(-1)[: self.length]  # type: ignore[attr-defined]
        return parameter.detach().view(-1)[self.start : self.start + self.length]

    def share(self, rank: int, size: int) -> "Partition":
        """The piece for `rank` of `size` nearly equal pieces of the partition; it may be empty."""
        begin, end = (self.length * number // size for number in (rank, rank + 1))
        return self._replace(offset=self.offset + begin, start=self.start + begin, length=end - begin)


def partitions(optimizer: Any, stage: int, model: nn.Module, rank: int) -> list[Partition]:
    """The partition of every parameter that this rank updates some of; at stage 0 it updates all of each."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    if stage == 3:
        found = _of_stage_3(optimizer, names, rank)
    elif stage:
        found = _of_stages_1_and_2(optimizer, names)
    else:
        found = _of_stage_0(optimizer, names)
    return [partition for partition in found if partition.length > 0]


def flat_groups(optimizer: Any, stage: int) -> list[Tensor]:
    """The tensors that are `Partition.flat`, once each, with the padding that they have."""
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(optimizer.single_partition_of_fp32_groups)
    return [flat for group in optimizer.param_groups for flat in group["params"]]


def gradient_pieces(optimizer: Any, stage: int, held: Iterable[Partition]) -> Iterator[tuple[str, Tensor]]:
    """Name and gradient of what this rank updates of each parameter at stage 2 or 3, or with offload.

    They are complete after the step's last micro-batch. With offload they lie like the masters, else in pieces.
    """
    if optimizer.cpu_offload if stage < 3 else optimizer.offload_optimizer:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # they may be on their way to the host; DeepSpeed waits for them, too
        for partition in held:
            yield partition.name, partition.of(cast(Tensor, partition.flat.grad)).values
        return
    names = {(id(partition.flat), partition.offset): partition.name for partition in held}
    for number, flat in enumerate(flat_groups(optimizer, stage)):
        offset = 0
        for piece in optimizer.averaged_gradients[number]:
            if (name := names.get((id(flat), offset))) is not None:
                yield name, piece.view(-1)
            offset += piece.numel()


def sync_from_masters(optimizer: Any, stage: int) -> None:
    """Set the weights that the layers compute with to the masters, on all ranks."""
    if stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()
    else:
        for parameter, master in _pairs_of_stage_0(optimizer):
            if parameter is not master:
                parameter.data.copy_(master.data)


def _of_stages_1_and_2(optimizer: Any, names: dict[Tensor, str]) -> Iterator[Partition]:
    groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    for parameters, flat in groups:
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                place, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Partition(names[parameter], flat, there.start, there.numel, place.start, tuple(parameter.shape))


def _of_stage_3(optimizer: Any, names: dict[Tensor, str], rank: int) -> Iterator[Partition]:
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()  # the same on all ranks: that of the last one is padded
            start = rank * size
            count = min(size, parameter.ds_numel - start)
            yield Partition(names[parameter], flat, offset, count, start, tuple(parameter.ds_shape))
            offset += size


def _of_stage_0(optimizer: Any, names: dict[Tensor, str]) -> Iterator[Partition]:
    for parameter, master in _pairs_of_stage_0(optimizer):
        yield Partition(names[parameter], master, 0, master.numel(), 0, tuple(parameter.shape))


def _pairs_of_stage_0(optimizer: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """Each parameter with its master; in a float32 run the parameter is its own master."""
    if not hasattr(optimizer, "fp32_groups"):
        return ((parameter, parameter) for group in optimizer.param_groups for parameter in group["params"])
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return (pair for both in pairs for pair in zip(*both, strict=True))
