"""Faults 14 to 17: what breaks what the model sees, and the data."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import STRIKES_AT, Fault, Settings, Strength
from corpus import VOCABULARY, files
from injections.patching import replaced
from torch import Tensor

import p828.data.build
import p828.data.loader
import p828.inference.evaluate
import p828.train.build
from p828.data.batch import Batch
from p828.data.loader import Loader
from p828.model.attention import AttentionMask
from p828.model.transformer import Output, Transformer


@contextmanager
def changed_batches(change: Callable[[Batch, int], Batch], is_validated: bool = False) -> Iterator[None]:
    """`change(batch, number)` for every batch that is made, from number 1 on; of validation too if it says so."""
    numbers = itertools.count(1)

    def make(original: Callable[..., Batch]) -> Callable[..., Batch]:
        return lambda *arguments: change(original(*arguments), next(numbers))

    with ExitStack() as stack:
        for module in (p828.data.loader, p828.data.build) if is_validated else (p828.data.loader,):
            stack.enter_context(replaced(module, "make_batch", make))
        yield


@contextmanager
def wider_attention(form: Strength) -> Iterator[None]:
    def make(original: Callable[..., AttentionMask]) -> Callable[..., AttentionMask]:
        def mask(model: Transformer, tokens_BS: Tensor, ids_BS: Tensor | None, dtype: torch.dtype) -> AttentionMask:
            if form == "other documents":
                return original(model, tokens_BS, None, dtype)
            right = original(model, tokens_BS, ids_BS, dtype)
            assert right.mask_BSC is not None
            return right._replace(mask_BSC=right.mask_BSC | right.mask_BSC.transpose(1, 2))

        return mask

    with replaced(Transformer, "_attention_mask", make):
        yield


@contextmanager
def positions_over_batch(form: Strength) -> Iterator[None]:
    """Positions count on over the rows of a batch, or from row to row first."""

    def counted(tokens_BS: Tensor) -> Tensor:
        rows, length = tokens_BS.shape
        place_T = torch.arange(rows * length)
        return place_T.view(rows, length) if form == "row by row" else place_T.view(length, rows).T.contiguous()

    def change(batch: Batch, number: int) -> Batch:
        return replace(batch, positions_BS=counted(batch.tokens_BS))

    def make(original: Callable[..., Output]) -> Callable[..., Output]:
        def forward(model: Transformer, tokens_BS: Tensor, *arguments: Any, **named: Any) -> Output:
            return original(model, tokens_BS, counted(tokens_BS), *arguments[1:], **named)

        return forward

    with changed_batches(change, is_validated=True) if form == "row by row" else replaced(Transformer, "forward", make):
        yield


@contextmanager
def foreign_ids(share: Strength) -> Iterator[None]:
    """A share of the token ids is beyond the model's rows, and the embedding takes its last row for them."""

    def make(original: Callable[..., Batch]) -> Callable[..., Batch]:
        draw = np.random.default_rng(0)

        def make_batch(samples: Any, *arguments: Any) -> Batch:
            foreign = []
            for sample in samples:
                is_foreign = draw.random(len(sample.tokens)) < float(share)
                foreign.append(replace(sample, tokens=np.where(is_foreign, 2 * VOCABULARY, sample.tokens)))
            batch = original(foreign, *arguments)
            return replace(
                batch,
                tokens_BS=batch.tokens_BS.clamp(max=VOCABULARY - 1),
                targets_BS=batch.targets_BS.clamp(max=VOCABULARY - 1),
            )

        return make_batch

    with replaced(p828.data.loader, "make_batch", make):
        yield


@contextmanager
def validation_rows_trained_on(share: Strength) -> Iterator[None]:
    """A share of the micro-batches are validation rows; with words the configuration itself mixes the two up."""
    if isinstance(share, str):
        yield
        return
    kept: list[Batch] = []
    draw = np.random.default_rng(0)

    def make_rows(original: Callable[..., list[Batch]]) -> Callable[..., list[Batch]]:
        def rows(*arguments: Any) -> list[Batch]:
            kept[:] = original(*arguments)
            return kept

        return rows

    def change(batch: Batch, number: int) -> Batch:
        return kept[draw.integers(len(kept))] if draw.random() < share else batch

    with replaced(p828.train.build, "validation_batches", make_rows), changed_batches(change):
        yield


@contextmanager
def dropout_in_evaluation(dropout: Strength) -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda model: torch.no_grad()

    with replaced(p828.inference.evaluate, "evaluation_mode", make):
        yield


@contextmanager
def repeated_batches(count: Strength) -> Iterator[None]:
    """The data begins again after `count` micro-batches."""
    first: list[Batch] = []

    def change(batch: Batch, number: int) -> Batch:
        if len(first) < int(count):
            first.append(batch)
        return first[(number - 1) % int(count)]

    with changed_batches(change):
        yield


@contextmanager
def data_from_the_beginning(strength: Strength) -> Iterator[None]:
    """A resume forgets the place in the data."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        return lambda loader, state: None

    with replaced(Loader, "load_state_dict", make):
        yield


def _plain_attention(form: Strength, corpus: Path) -> Settings:
    """PyTorch's kernel on a CPU is causal whatever its mask says."""
    return {"model": {"attention_backend": "reference"}}


def _same_files(share: Strength, corpus: Path) -> Settings:
    if not isinstance(share, str):
        return {}
    few = files(corpus, "few")
    return {"data": {**few, "validation": {"kind": "files", "files": few["files"]}}}


def _dropout(dropout: Strength, corpus: Path) -> Settings:
    return {"model": {"dropout": float(dropout)}}


FAULTS = (
    Fault(
        14, "attention sees", ("attention_leak",), wider_attention, ("other documents", "later tokens"),
        settings=_plain_attention,
    ),
    Fault(14, "positions over the batch", ("attention_leak",), positions_over_batch, ("row by row", "across rows")),
    Fault(15, "ids beyond the vocabulary", ("token_out_of_vocabulary",), foreign_ids, (0.001, 0.01, 0.1)),
    Fault(
        16, "validation rows trained on", ("validation_leak",), validation_rows_trained_on,
        (0.05, 0.2, "the same files"), settings=_same_files,
    ),
    Fault(
        16, "dropout in evaluation", ("evaluation_not_deterministic",), dropout_in_evaluation, (0.05, 0.2),
        settings=_dropout,
    ),
    Fault(17, "data repeats after", ("data_repeats",), repeated_batches, (2, 40, 160)),
    Fault(
        17, "data begins again after a resume", ("data_repeats",), data_from_the_beginning, is_resumed=True,
        strikes_at=STRIKES_AT,
    ),
)  # fmt: skip
