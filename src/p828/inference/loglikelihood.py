"""Log-likelihoods of continuations under a model: what multiple-choice tasks are scored by.

N counts the scored tokens of a batch, R its rows, S the tokens of its longest row, V the model's vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from p828.inference.evaluate import evaluation_mode, uncompiled
from p828.model.backend import LOSS_CHUNK_TOKENS
from p828.model.transformer import Transformer


class Request(NamedTuple):
    context: Sequence[int]
    """At least one token."""
    continuation: Sequence[int]


class Score(NamedTuple):
    nats: float
    """Sum of log p(token | all tokens before it) over the continuation; NaN for a model that diverged."""
    is_greedy: bool
    """Whether each token of the continuation is the most likely one."""


class _Window(NamedTuple):
    """What is put through the model at once: the last `scored` of these tokens are predicted from those before."""

    request: int
    tokens: list[int]
    scored: int

    @property
    def inputs(self) -> list[int]:
        return self.tokens[:-1]


def loglikelihoods(
    model: Transformer,
    requests: Sequence[Request],
    dtype: torch.dtype,
    batch_tokens: int,
    on_progress: Callable[[int], None] = lambda windows: None,
) -> list[Score]:
    """The score of each request, computed in `dtype`. An empty continuation has the score 0, and is greedy.

    A context too long for `max_position_embeddings` loses its beginning. A continuation that is longer than that is
    scored piece by piece, each with as many tokens before it as fit. Such windows are sorted by length. A batch holds
    about `batch_tokens` tokens, padding included, or one window; those that differ in their last token alone, as the
    answers A to D, are one row of it. `on_progress` gets the number of windows done. How requests are batched changes a
    score by the rounding of matrix products only. The model's training mode stays.
    """
    device, longest = model.head_weight.device, model.config.max_position_embeddings
    windows = [window for index, request in enumerate(requests) for window in _windows(index, request, longest)]
    windows.sort(key=lambda window: (-len(window.tokens), window.tokens))
    nats = torch.zeros(len(requests), dtype=torch.float64, device=device)
    misses = torch.zeros(len(requests), dtype=torch.int64, device=device)
    done = 0
    with evaluation_mode(model), uncompiled(model):
        head_VH = model.head_weight.to(dtype)
        for batch in _batches(windows, batch_tokens):
            nats_N, is_miss_N = _score(model, head_VH, batch, dtype)
            request_N = torch.tensor([window.request for window in batch for _ in range(window.scored)], device=device)
            nats.index_add_(0, request_N, nats_N)
            misses.index_add_(0, request_N, is_miss_N)
            done += len(batch)
            on_progress(done)
    return [Score(*pair) for pair in zip(nats.tolist(), (misses == 0).tolist(), strict=True)]


def _windows(index: int, request: Request, longest: int) -> Iterator[_Window]:
    tokens = [*request.context, *request.continuation]
    for start in range(len(request.context), len(tokens), longest):
        end = min(start + longest, len(tokens))
        yield _Window(index, tokens[max(end - longest - 1, 0) : end], end - start)


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Windows of falling length, as many at a time as fit."""
    batch: list[_Window] = []
    rows = 0
    for window in windows:
        is_row = not batch or batch[-1].inputs != window.inputs
        if batch and is_row and (rows + 1) * len(batch[0].inputs) > batch_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(window)
        rows += is_row
    if batch:
        yield batch


def _score(model: Transformer, head_VH: Tensor, batch: Sequence[_Window], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float64 (N,) log p of the scored tokens, window by window, and int64 (N,): 1 where another token is likelier."""
    device, length = head_VH.device, len(batch[0].inputs)
    rows: list[list[int]] = []
    places: list[int] = []
    for window in batch:
        inputs = window.inputs
        if not rows or rows[-1] != inputs:
            rows.append(inputs)
        last = (len(rows) - 1) * length + len(inputs)
        places += range(last - window.scored, last)
    # Padding stands on the right, where no scored token sees it.
    tokens_RS = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    hidden_RSH = model(tokens_RS, dtype=dtype).hidden_BSH
    targets_N = torch.tensor([token for window in batch for token in window.tokens[-window.scored :]], device=device)
    hidden_NH = hidden_RSH.flatten(0, 1)[torch.tensor(places, device=device)]
    nats, misses = [], []
    chunk = LOSS_CHUNK_TOKENS[device.type]
    for hidden_nH, targets_n in zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True):
        logits_nV = (hidden_nH @ head_VH.T).float()
        nats.append(-F.cross_entropy(logits_nV, targets_n, reduction="none").double())
        misses.append((logits_nV.argmax(1) != targets_n).long())
    return torch.cat(nats), torch.cat(misses)
