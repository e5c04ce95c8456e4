"""A model's weights and balance bias as an engine takes them: float32, by name, each read when it is asked for."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from math import prod

from torch import Tensor

from p828.runs.tensors import Tensors

PART = "model"  # of a checkpoint


class Weights(Mapping[str, Tensor]):
    """The tensors of `model.transformer.Transformer.state_dict`, wherever they come from. None is kept."""

    shapes: Mapping[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.shard(name, 0, prod(shape)).view(shape)

    @abstractmethod
    def shard(self, name: str, start: int, count: int) -> Tensor:
        """(count,): the flattened tensor's numbers from index `start` on."""


class SavedWeights(Weights):
    """Those of a checkpoint whose files are open. Raises DamagedCheckpoint."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.shapes = {name: tensors.kind(PART, name).shape for name in tensors.names(PART)}

    def shard(self, name: str, start: int, count: int) -> Tensor:
        return self._tensors.shard(PART, name, start, count)
