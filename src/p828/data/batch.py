"""Samples, which are sequences of tokens, and batches of them as tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PADDING = -1  # in place of a document's number
NO_TARGET = -100
HASHES = 2**32  # a batch's hash is below it


class DocumentPlace(NamedTuple):
    """Where a document of a sample comes from."""

    shard: str
    """Path of the file or of the shard of prepared data, or name of the hub's shard."""
    record: int
    """Number of the document in it, from 0: of a line, a row, a piece of a large text file."""
    start: int
    """Tokens of the document that come before those in the sample."""


@dataclass(frozen=True)
class Sample:
    """One sequence: S tokens to predict from, and the next token of each."""

    tokens: npt.NDArray[np.int64]
    """[S+1]; shorter only before `padded`. EOS where padded."""
    document_ids: npt.NDArray[np.int32]
    """[S+1]: 0, 1, 2, … within the sample; a document's EOS belongs to it. -1 where padded, at the end."""
    epoch: int = 0
    """Epoch of the sample's first document."""
    documents: int = 0
    """Documents that end in the sample."""
    split_documents: int = 0
    """Those of them that begin in another sample."""
    source: int = 0
    """Number of the mixture's source."""
    text_bytes: npt.NDArray[np.int64] | None = None
    """[S+1]: bytes of UTF-8 text that each token stands for; 0 where padded. Validation samples have them if known."""
    is_target: npt.NDArray[np.bool_] | None = None
    """[S+1]: whether the token is to be predicted, where not all are; False where padded, and at a document's start."""
    places: tuple[DocumentPlace, ...] = ()
    """Of training samples one for each document, in the order of their ids."""

    def padded(self, length: int, eos_id: int) -> "Sample":
        """The sample with `length` tokens, the missing ones EOS of no document."""
        missing = length - len(self.tokens)
        if not missing:
            return self
        return replace(
            self,
            tokens=np.pad(self.tokens, (0, missing), constant_values=eos_id),
            document_ids=np.pad(self.document_ids, (0, missing), constant_values=PADDING),
            text_bytes=None if self.text_bytes is None else np.pad(self.text_bytes, (0, missing)),
            is_target=None if self.is_target is None else np.pad(self.is_target, (0, missing)),
        )

    def targets(self) -> npt.NDArray[np.bool_]:
        """[S]: at which tokens there is a next one to predict."""
        is_token = self.document_ids[1:] != PADDING
        return is_token if self.is_target is None else is_token & self.is_target[1:]


@dataclass(frozen=True)
class Batch:
    """B samples of S tokens, and the token to predict at each."""

    tokens_BS: Tensor
    """int64; EOS where padded."""
    targets_BS: Tensor
    """int64: the next token, of the next document too; -100 where there is none, or none that counts."""
    positions_BS: Tensor
    """int64: from 0 at each document's first token in the sample, or 0 … S-1 without document masking."""
    document_ids_BS: Tensor
    """int32: 0, 1, … within the sample; -1 where padded."""
    num_targets: int
    """Targets that are not -100, counted on the host."""
    source_tokens: tuple[int, ...] = ()
    """Tokens that are not padding, for each source of the mixture. Of text, each has a target."""
    documents: int = 0
    """Documents that end in the batch."""
    split_documents: int = 0
    """Those of them that begin in another sample."""
    hash: int = 0
    """Sum of a hash of each sample's tokens, modulo 2^32: independent of how samples are divided into batches."""
    row_keys: tuple[int, ...] = ()
    """Of each sample a hash of its tokens and its epoch, below 2^32."""
    text_bytes: int | None = 0
    """Bytes of UTF-8 text that the targets stand for, in validation batches; None where they are not known."""
    epoch: int = 0
    """Latest epoch of a sample; the first epoch is 0."""
    attended_pairs: int = 0
    """Pairs of a token and one that its attention sees, itself among them; padding left out. L (L + 1) / 2 for each
    document of L tokens in a sample, or for each sample without document masking."""
    max_token: int = 0
    """Largest token id of the samples, targets included."""
    fingerprints: npt.NDArray[np.uint64] | None = None
    """Hashes of some of the rows' windows, as `data.fingerprints` finds them."""
    places: tuple[tuple[int, tuple[DocumentPlace, ...]], ...] = ()
    """Of training batches for each row the number of its source, and its documents' places."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting if it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def without_targets(self) -> "Batch":
        """The same tokens with no target."""
        return replace(self, targets_BS=torch.full_like(self.targets_BS, NO_TARGET), num_targets=0, text_bytes=0)

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def copy_(self, other: "Batch") -> None:
        """Copy the tensors of a batch of the same shape, without waiting if they are pinned."""
        for own, new in (
            (self.tokens_BS, other.tokens_BS),
            (self.targets_BS, other.targets_BS),
            (self.positions_BS, other.positions_BS),
            (self.document_ids_BS, other.document_ids_BS),
        ):
            own.copy_(new, non_blocking=True)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            tokens_BS=change(self.tokens_BS),
            targets_BS=change(self.targets_BS),
            positions_BS=change(self.positions_BS),
            document_ids_BS=change(self.document_ids_BS),
        )
