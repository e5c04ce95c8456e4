"""Cloze: which of four endings of a context does a model find the likeliest?

The items were written for p828, about English and about Python. They are few and easy, so that a small model shows in
seconds whether it has learnt anything: guessing is right once in four times.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from p828.errors import DataError, NotFinite
from p828.inference.tasks.interval import fraction_interval
from p828.inference.tasks.task_model import TaskModel

ENDINGS = 4
GUESSING = 1 / ENDINGS


@dataclass(frozen=True)
class Item:
    context: str
    endings: tuple[str, ...]
    """`ENDINGS` of them; each begins with the space or line that parts it from the context."""
    answer: int
    """Index of the right ending."""


@dataclass(frozen=True)
class ClozeResult:
    accuracy: float
    """Fraction of the items whose right ending is the likeliest, by log-likelihood per byte."""
    accuracy_low: float
    accuracy_high: float
    """Ends of the accuracy's 95% interval over items: bootstrap, or Wilson's where all are right, or none is."""
    margin: float
    """Mean over items of how much likelier the right ending is than the likeliest wrong one, in nats per byte."""
    items: int


def read_items(name: str) -> list[Item]:
    """The items of one of `OWN_NAMES`, in their order. Raises DataError naming the line that is no item."""
    resource = files("p828.inference.tasks") / f"{name}.jsonl"
    lines = resource.read_text(encoding="utf-8").splitlines()
    return [_item(line, f"{name}.jsonl, line {number}") for number, line in enumerate(lines, start=1)]


def _item(line: str, where: str) -> Item:
    try:
        values: dict[str, Any] = json.loads(line)
        item = Item(values["context"], tuple(values["endings"]), values["answer"])
        if len(item.endings) != ENDINGS or not 0 <= item.answer < ENDINGS:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: not an item with a context, {ENDINGS} endings and an answer") from None
    return item


def measure(name: str, model: TaskModel, limit: int | None = None) -> ClozeResult:
    """Score the endings of all items, or of the first `limit`, by log-likelihood over their bytes of UTF-8.

    Raises NotFinite for a model that diverged.
    """
    items = read_items(name)[:limit]
    nats_NE = np.array(model.ending_loglikelihoods([(item.context, item.endings) for item in items]))
    if not np.isfinite(nats_NE).all():
        raise NotFinite(f"{name}: the model's log-likelihoods are no finite numbers: its weights diverged")
    bytes_NE = np.array([[len(ending.encode()) for ending in item.endings] for item in items])
    per_byte_NE, item_N = nats_NE / bytes_NE, np.arange(len(items))
    answer_N = np.array([item.answer for item in items])
    right_N = per_byte_NE[item_N, answer_N]
    wrong_NE = per_byte_NE.copy()
    wrong_NE[item_N, answer_N] = -np.inf
    margin_N = right_N - wrong_NE.max(axis=1)
    is_right_N = margin_N > 0
    low, high = fraction_interval(is_right_N.tolist())
    return ClozeResult(float(is_right_N.mean()), low, high, float(margin_N.mean()), len(items))
