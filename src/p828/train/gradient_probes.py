"""Probes that take a backward pass, beside the training's own, over the beginning of a row.

It is not compiled, so it keeps more of each token than training does, and takes few tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from p828.config import BalanceConfig
from p828.data.batch import Batch
from p828.engine.microbatch import auxiliary_losses
from p828.inference.evaluate import uncompiled
from p828.model.loss import IGNORE
from p828.model.router import Router, Routing
from p828.model.transformer import Output, Transformer
from p828.system.device import random_states, restore_random_states

TOKENS = 512  # of the row


def auxiliary_gradient(model: Transformer, batch: Batch, balance: BalanceConfig, dtype: torch.dtype) -> float:
    """The norm of all routers' gradients from the auxiliary losses alone, per target."""
    weights = [layer.mlp.gate.weight for layer in model.layers]
    with _beside_training(model):
        output, valid_BS = _forward(model, batch, dtype)
        scale = 1 / valid_BS.sum().clamp_min(1).float()
        losses = [loss for loss in auxiliary_losses(output.router, balance, scale) if loss.requires_grad]
        if not losses:
            return 0.0
        found = torch.autograd.grad(losses, weights, allow_unused=True)
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in found if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)).item()) if norms else 0.0


def rerouted_share(model: Transformer, batch: Batch, dtype: torch.dtype) -> float:
    """The share of tokens whose experts differ where a backward pass with recomputation routes them once more.

    0 if it does not route them again.
    """
    chosen: dict[Router, list[Tensor]] = {layer.mlp.gate: [] for layer in model.layers}

    def note(gate: Router, given: tuple[Tensor, ...], routing: Routing) -> None:
        chosen[gate].append(routing.experts_TK.detach().sort(dim=1).values)

    handles = [gate.register_forward_hook(note) for gate in chosen]
    try:
        with _beside_training(model):
            embedded_BSH = model.embed(batch.tokens_BS[:1, :TOKENS].to(model.head_weight.device), dtype)
            embedded_BSH = embedded_BSH.detach().requires_grad_()
            output, _ = _forward(model, batch, dtype, embedded_BSH)
            torch.autograd.grad(output.hidden_BSH.float().square().sum(), embedded_BSH)
    finally:
        for handle in handles:
            handle.remove()
    again = [(first, later) for first, *rest in chosen.values() for later in rest]
    if not again:
        return 0.0
    return float(torch.cat([(first != later).any(dim=1) for first, later in again]).float().mean().item())


def _forward(
    model: Transformer, batch: Batch, dtype: torch.dtype, embedded_BSH: Tensor | None = None
) -> tuple[Output, Tensor]:
    """The model's output for the beginning of the batch's first row, and which tokens of it have a target."""
    tokens_BS, targets_BS, positions_BS, ids_BS = (
        tensor[:1, :TOKENS].to(model.head_weight.device)
        for tensor in (batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.document_ids_BS)
    )
    valid_BS = targets_BS != IGNORE
    return model(tokens_BS, positions_BS, ids_BS, dtype, embedded_BSH, valid_BS=valid_BS), valid_BS


@contextmanager
def _beside_training(model: Transformer) -> Iterator[None]:
    """Layers as in training, but not compiled for a single row; dropout does not move the run's random states on."""
    device = model.head_weight.device
    states = random_states(device)
    try:
        with uncompiled(model), torch.enable_grad():
            yield
    finally:
        restore_random_states(states, device)
