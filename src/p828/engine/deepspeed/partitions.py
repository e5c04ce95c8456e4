"""Where DeepSpeed keeps this rank's share of the float32 masters and of AdamW's moments.

DeepSpeed flattens parameters, group by group, and cuts what comes out into a share for each rank; stage 3 cuts every
parameter by itself. Its own checkpoints are tied to that cut. Knowing which numbers of which parameter lie where, a
share can be saved and loaded by the parameter's name and place, whatever the stage and the number of ranks.

The attributes read here are DeepSpeed 0.19's, the same that its universal checkpoints and `safe_get_…` functions use.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from p828.runs.tensors import TensorShard


class Partition(NamedTuple):
    """The numbers of one parameter that a rank updates."""

    name: str
    flat: Tensor
    """The float32 tensor that holds them, which is the key to the optimizer's state of them."""
    offset: int
    """The place of the first one in `flat`."""
    length: int
    start: int
    """The place of the first one in the flattened parameter."""
    shape: tuple[int, ...]
    """The whole parameter's."""

    def of(self, like_flat: Tensor) -> TensorShard:
        """What belongs to this part in `flat`, or in a tensor of the optimizer's state that is laid out alike."""
        values = like_flat.detach().view(-1).narrow(0, self.offset, self.length)
        return TensorShard(values, self.start, self.shape)

    def share(self, rank: int, size: int) -> "Partition":
        """One of `size` nearly equal pieces of it, maybe an empty one."""
        begin, end = (self.length * number // size for number in (rank, rank + 1))
        return self._replace(offset=self.offset + begin, start=self.start + begin, length=end - begin)


def partitions(optimizer: Any, stage: int, model: nn.Module, rank: int) -> list[Partition]:
    """Of every parameter the part that this rank updates, if it has one; at stage 0 that is all of it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    if stage == 3:
        found = _of_stage_3(optimizer, names, rank)
    elif stage:
        found = _of_stages_1_and_2(optimizer, names)
    else:
        found = _of_stage_0(optimizer, names)
    return [part for part in found if part.length > 0]


def flat_groups(optimizer: Any, stage: int) -> list[Tensor]:
    """All `Partition.flat`, padding included."""
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(optimizer.single_partition_of_fp32_groups)
    return [flat for group in optimizer.param_groups for flat in group["params"]]


def sync_from_masters(optimizer: Any, stage: int) -> None:
    """Compute with the masters as they are now, on all ranks."""
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
            size = parameter.partition_numel()  # the same on all ranks: the last one's is filled up
            start = rank * size
            count = min(size, parameter.ds_numel - start)
            yield Partition(names[parameter], flat, offset, count, start, tuple(parameter.ds_shape))
            offset += size


def _of_stage_0(optimizer: Any, names: dict[Tensor, str]) -> Iterator[Partition]:
    for parameter, master in _pairs_of_stage_0(optimizer):
        yield Partition(names[parameter], master, 0, master.numel(), 0, tuple(parameter.shape))


def _pairs_of_stage_0(optimizer: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """Each parameter and its master, which in a float32 run is the parameter itself."""
    if not hasattr(optimizer, "fp32_groups"):
        return ((parameter, parameter) for group in optimizer.param_groups for parameter in group["params"])
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return (pair for both in pairs for pair in zip(*both, strict=True))
