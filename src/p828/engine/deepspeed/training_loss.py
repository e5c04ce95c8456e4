"""A micro-batch's loss as a module, which DeepSpeed wraps with its hooks."""

import torch
from torch import Tensor, nn

from p828.config import BalanceConfig
from p828.engine.microbatch import auxiliary_losses, micro_batch_totals
from p828.model.loss import IGNORE, LinearCrossEntropy
from p828.model.transformer import Transformer


class TrainingLoss(nn.Module):
    """The module that DeepSpeed wraps: from a micro-batch to its share of the step's loss."""

    def __init__(self, model: Transformer, balance: BalanceConfig, dtype: torch.dtype, ranks: int) -> None:
        super().__init__()
        self.model, self.balance, self.dtype, self.ranks = model, balance, dtype, ranks
        self.head_loss = HeadLoss(model)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor, positions_BS: Tensor, document_ids_BS: Tensor, scale: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss to differentiate, times `scale`; and the values of `micro_batch_totals`.

        `scale` is the number of ranks over the step's targets, since DeepSpeed takes the mean over ranks.
        """
        valid_BS = targets_BS != IGNORE
        output = self.model(tokens_BS, positions_BS, document_ids_BS, dtype=self.dtype, valid_BS=valid_BS)
        cross_entropy = self.head_loss(output.hidden_BSH.flatten(0, 1), targets_BS.flatten(), scale)
        loss = cross_entropy + sum(auxiliary_losses(output.router, self.balance, scale))
        own_scale = scale / self.ranks
        auxiliary = auxiliary_losses(output.router, self.balance, own_scale)
        totals = micro_batch_totals(cross_entropy.detach() / self.ranks, auxiliary, output.router, own_scale)
        return loss, *totals.values()


class HeadLoss(nn.Module):
    """Owns the head's weight where it is used: stage 3 gathers a module's own weights when the module is called."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.weight = model.head_weight

    def forward(self, hidden_TH: Tensor, targets_T: Tensor, scale: Tensor) -> Tensor:
        return LinearCrossEntropy.apply(hidden_TH, self.weight, targets_T, scale)
