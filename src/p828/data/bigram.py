"""The baseline that a model must beat: a bigram model of the same tokens."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from p828.data.batch import NO_TARGET, Batch

# Back-off strengths that are tried, in counts.
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


def bigram_loss(training_rows: Iterable[npt.NDArray[np.int64]], validation: list[Batch], vocab_size: int) -> float:
    """Mean loss in nats per valid target of a bigram model that backs off to unigrams.

    p(b|a) = (c(a,b) + λ p(b)) / (c(a) + λ), with p(b) = (c(b) + 1) / (N + V); pairs are counted within the
    training rows, and N is their number of tokens. λ is the one of `STRENGTHS` that is best on the validation
    rows themselves: generous to the baseline on purpose, so that beating it means something.

    Args:
        training_rows: token ids, [any length] each.
        validation: batches on the host.
    """
    rows = [np.asarray(row) for row in training_rows]
    tokens = np.concatenate(rows)
    codes = np.concatenate([row[:-1] * vocab_size + row[1:] for row in rows])
    pairs, pair_counts = np.unique(codes, return_counts=True)
    counts_after = np.bincount(np.concatenate([row[:-1] for row in rows]), minlength=vocab_size)  # c(a)
    unigram = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)

    inputs = np.concatenate([batch.tokens_BS.numpy().ravel() for batch in validation])
    targets = np.concatenate([batch.targets_BS.numpy().ravel() for batch in validation])
    inputs, targets = inputs[targets != NO_TARGET], targets[targets != NO_TARGET]
    wanted = inputs * vocab_size + targets
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    together = np.where(pairs[places] == wanted, pair_counts[places], 0)  # c(a,b)
    return min(
        float(-np.log((together + strength * unigram[targets]) / (counts_after[inputs] + strength)).mean())
        for strength in STRENGTHS
    )
