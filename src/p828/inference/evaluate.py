"""Loss, perplexity and bits per byte of a model on given rows."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from p828.data.batch import Batch
from p828.errors import DataError
from p828.model.loss import linear_cross_entropy, token_losses
from p828.model.transformer import Layer, Transformer


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean nats per target token."""
    perplexity: float
    """As `perplexity` gives it."""
    bits_per_byte: float | None
    """All targets' bits over the bytes of text they stand for: comparable between tokenizers, unlike the loss.

    None where the bytes are not known: of prepared data that is decoded to other text than it was made from.
    """
    tokens: int
    """Target tokens."""
    bytes: int | None
    """Bytes of UTF-8 text in the targets; a document's end counts for none. None where they are not known."""


def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    dtype: torch.dtype = torch.float32,
    total: Callable[[Sequence[float]], Sequence[float]] = lambda counts: counts,
) -> Evaluation:
    """Evaluate on all batches, computing in `dtype`.

    Where processes have some of the batches each, `total` gives the sums of what they counted.

    Rows are summed on their own in float32, then in float64, so that how rows are batched changes the result by no
    more than the rounding of the layers' matrix products. The model's training mode stays as it is.
    Raises DataError when there is no target.
    """
    device = model.head_weight.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = text_bytes = unknown = 0
    with evaluation_mode(model):
        head_VH = model.head_weight.to(dtype)
        for batch in batches:
            tokens += batch.num_targets
            text_bytes += batch.text_bytes or 0
            unknown += batch.text_bytes is None
            batch = batch.to(device)
            hidden_BSH = model(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=dtype).hidden_BSH
            for hidden_SH, targets_S in zip(hidden_BSH, batch.targets_BS, strict=True):
                nats += linear_cross_entropy(hidden_SH, head_VH, targets_S)
    all_nats, all_tokens, all_bytes, all_unknown = total((nats.item(), tokens, text_bytes, unknown))
    if all_tokens == 0:
        raise DataError("nothing to evaluate: the rows hold no target token")
    return _evaluation(all_nats, int(all_tokens), None if all_unknown else int(all_bytes))


def token_nats(model: Transformer, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Minus the log-probability of each target, as `evaluate` computes it: float32 (B, S), 0 where there is none."""
    with evaluation_mode(model):
        batch = batch.to(model.head_weight.device)
        hidden_BSH = model(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=dtype).hidden_BSH
        losses_T = token_losses(hidden_BSH.flatten(0, 1), model.head_weight, batch.targets_BS.flatten())
        return losses_T.view_as(batch.targets_BS)


@contextmanager
def evaluation_mode(model: Transformer) -> Iterator[None]:
    """No gradients and no dropout inside; the model's training mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def uncompiled(model: Transformer) -> AbstractContextManager[None]:
    """Compiled layers run as they were written inside, since a trainer's would be compiled anew for each length."""
    return torch.compiler.set_stance("force_eager") if any(map(_is_compiled, model.layers)) else nullcontext()


def _is_compiled(layer: Layer) -> bool:
    """As a whole, by the plain engine, or its `forward` alone, by DeepSpeed's."""
    return layer._compiled_call_impl is not None or "forward" in vars(layer)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def _evaluation(nats: float, tokens: int, text_bytes: int | None) -> Evaluation:
    loss = nats / tokens
    bits = nats / math.log(2)
    bits_per_byte = None if text_bytes is None else bits / text_bytes if text_bytes else math.inf
    return Evaluation(loss, perplexity(loss), bits_per_byte, tokens, text_bytes)
