"""The weights of a directory in the hub's layout, by p828's names: compared with the model, and read when asked for."""

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.config.values import shown
from p828.errors import DataError, did_you_mean
from p828.interchange.architectures.architecture import Piece
from p828.interchange.stored_tensors import StoredTensors
from p828.runs.checkpoint_content import expected_tensors
from p828.runs.weights import Weights

# Tensors of old files that hold nothing of the model.
WITHOUT_MEANING = ".rotary_emb.inv_freq"
SPARE_NUMBERS = 2**24  # that a model may have beyond those in the files: balance biases, a dense model's routers


class HubWeights(Weights):
    """The weights of an open directory, as float32. What a foreign model does not have, as a balance bias, is 0.

    Reading raises DataError for a tensor that cannot be read, or with a number that is not finite.
    """

    def __init__(self, stored: StoredTensors, model: ModelConfig, pieces: Callable[[str, ModelConfig], list[Piece]]):
        """Compares names and shapes of all tensors with the model's. Raises DataError."""
        self._stored, self._model, self._pieces = stored, model, pieces
        _check_size(stored, model)
        self.shapes = {name: shape for name, (shape, _) in expected_tensors(stored.directory, model).items()}
        if sum(map(prod, self.shapes.values())) > stored.size() + SPARE_NUMBERS:
            raise DataError(f"{stored.directory}: config.json is of a larger model than the files hold")
        self._check_tensors()

    def shard(self, name: str, start: int, count: int) -> Tensor:
        values = torch.zeros(count)
        for piece, first, length in self._placed(name):
            begin, end = max(start, first), min(start + count, first + length)
            if begin < end:
                numbers = self._stored.numbers(piece, begin - first, end - first)
                if not all(extreme.isfinite() for extreme in numbers.aminmax()):  # NaN is both; no copy is made
                    raise DataError(f"{self._stored.directory}: {piece} holds numbers that are not finite")
                values[begin - start : end - start] = numbers
        return values

    def _placed(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Their tensors that are one of ours, each with its first place in our flattened tensor and its length."""
        whole = torch.empty(self.shapes[name], device="meta")
        for piece in self._pieces(name, self._model):
            part = whole[piece.place]
            yield piece.name, int(part.storage_offset()), part.numel()

    def _check_tensors(self) -> None:
        directory, kinds, found = self._stored.directory, self._stored.kinds, set[str]()
        for name, shape in self.shapes.items():
            whole = torch.empty(shape, device="meta")
            for piece in self._pieces(name, self._model):
                expected = tuple(whole[piece.place].shape)
                if piece.name not in kinds:
                    raise DataError(
                        f"{directory}: the weights lack {piece.name}, which by config.json has the shape "
                        f"{list(expected)}{did_you_mean(piece.name, kinds)}"
                    )
                if kinds[piece.name].shape != expected:
                    raise DataError(
                        f"{directory}: {piece.name} has the shape {shown(list(kinds[piece.name].shape))}, "
                        f"by config.json it is {list(expected)}"
                    )
                found.add(piece.name)
        ignored = {name for name in kinds if name.endswith(WITHOUT_MEANING)}
        if self._model.tie_word_embeddings:
            ignored.add("lm_head.weight")  # which transformers does not read then
        if further := sorted(kinds.keys() - found - ignored):
            more = f" and {len(further) - 1:,} more" if len(further) > 1 else ""
            raise DataError(
                f"{directory}: the weights hold {shown(further[0])[1:-1]}{more}, which by "
                "config.json the model does not have"
            )


def _check_size(stored: StoredTensors, model: ModelConfig) -> None:
    """Raises DataError before a model is laid out that the files cannot hold."""
    if model.num_hidden_layers > len(stored.kinds) or model.n_routed_experts > stored.size():
        raise DataError(f"{stored.directory}: config.json is of a larger model than the files hold")
