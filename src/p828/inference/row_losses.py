"""The loss of every row of some batches, and of every document in it: which text a model finds hard."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from p828.data.batch import NO_TARGET, Batch
from p828.inference.evaluate import evaluation_mode
from p828.model.loss import token_losses
from p828.model.transformer import Transformer


@dataclass(frozen=True)
class RowLoss:
    loss: float | None
    """Mean nats per target of the row; None without a target."""
    documents: tuple[float | None, ...]
    """The same of each document's part of the row, in the order of their ids."""


def row_losses(model: Transformer, batches: Iterable[Batch], dtype: torch.dtype = torch.float32) -> list[RowLoss]:
    """The losses of all rows, computed in `dtype`. A target belongs to the document of the token before it."""
    device = model.head_weight.device
    found = []
    with evaluation_mode(model):
        for batch in batches:
            batch = batch.to(device)
            hidden_BSH = model(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=dtype).hidden_BSH
            rows = zip(hidden_BSH, batch.targets_BS, batch.document_ids_BS, strict=True)
            for hidden_SH, targets_S, ids_S in rows:
                has_target_S = targets_S != NO_TARGET
                losses_N = token_losses(hidden_SH[has_target_S], model.head_weight, targets_S[has_target_S]).double()
                ids_N, documents = ids_S[has_target_S].long(), int(ids_S.max()) + 1
                sums = torch.zeros(documents, dtype=torch.float64, device=device).index_add_(0, ids_N, losses_N)
                counts = ids_N.bincount(minlength=documents).tolist()
                means = [total / n if n else None for total, n in zip(sums.tolist(), counts, strict=True)]
                found.append(RowLoss(losses_N.mean().item() if len(losses_N) else None, tuple(means)))
    return found
