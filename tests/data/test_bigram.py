import math
from collections import Counter

import numpy as np
import pytest
import torch

from p828.data.batch import Batch
from p828.data.bigram import STRENGTHS, bigram_loss


def batch(tokens: np.ndarray, targets: np.ndarray) -> Batch:
    nothing = torch.zeros(tokens.shape, dtype=torch.int64)
    count = int((targets != -100).sum())
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), nothing, nothing.int(), count)


@pytest.mark.parametrize("vocab_size", [12, 49_152])
def test_against_counting_by_hand(vocab_size: int) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 12, size=length) + vocab_size - 12 for length in (40, 40, 7)]
    validation = [draw.integers(0, 12, size=(3, 9)) + vocab_size - 12 for _ in range(2)]
    targets = [np.where(draw.random((3, 8)) < 0.2, -100, tokens[:, 1:]) for tokens in validation]
    batches = [batch(v[:, :-1], t) for v, t in zip(validation, targets, strict=True)]

    together, after, alone = Counter(), Counter(), Counter()
    for row in rows:
        alone.update(row.tolist())
        for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            together[a, b] += 1
            after[a] += 1
    assert 10 < len(together) < 144, "some pairs must be unseen"
    losses = []
    for strength in STRENGTHS:
        losses.append([])
        for one in batches:
            for a, b in zip(one.tokens_BS.ravel().tolist(), one.targets_BS.ravel().tolist(), strict=True):
                if b != -100:
                    p = (alone[b] + 1) / (sum(alone.values()) + vocab_size)
                    losses[-1].append(-math.log((together[a, b] + strength * p) / (after[a] + strength)))
    expected = min(sum(values) / len(values) for values in losses)
    # Both are double precision; they add 40 terms of order 1 in different orders.
    assert bigram_loss(rows, batches, vocab_size) == pytest.approx(expected, rel=1e-13)


def test_a_sequence_without_surprise_costs_almost_nothing() -> None:
    """0 1 0 1 …: with n pairs each way and λ = 0.1, p(next) = (n + 0.1 p) / (n + 0.1), p = (N/2 + 1) / (N + V)."""
    row = np.tile([0, 1], 501)[:1001]
    p = np.array([501 + 1, 500 + 1]) / (1001 + 2)
    expected = -np.log((500 + 0.1 * p) / (500 + 0.1)).mean()
    validation = np.array([[0, 1, 0, 1]])
    assert bigram_loss([row], [batch(validation, 1 - validation)], 2) == pytest.approx(expected, rel=1e-12)


def test_independent_tokens_cost_their_entropy() -> None:
    draw = np.random.default_rng(1)
    row = draw.choice(4, size=200_000, p=[0.5, 0.25, 0.125, 0.125])
    check = draw.choice(4, size=(1, 100_001), p=[0.5, 0.25, 0.125, 0.125])
    entropy = 1.75 * math.log(2)
    # The mean of 1e5 surprises whose standard deviation is 0.83 ln 2: five standard errors are 0.009.
    assert bigram_loss([row], [batch(check[:, :-1], check[:, 1:])], 4) == pytest.approx(entropy, abs=0.009)
