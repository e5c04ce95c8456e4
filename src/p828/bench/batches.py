"""Made-up batches: random tokens in documents of varying length."""

import dataclasses

import numpy as np
import torch

from p828.config import Config
from p828.data.batch import Batch, Sample
from p828.data.loader import make_batch

NUM_BATCHES = 4  # rotated, so that the experts' loads and the documents change from one micro-batch to the next
MEAN_DOCUMENT = 300


def random_batches(config: Config, device: torch.device) -> list[Batch]:
    """NUM_BATCHES micro-batches on the host, pinned for a GPU, as the loader hands them out."""
    draw = np.random.default_rng(config.train.seed)
    batches = []
    for _ in range(NUM_BATCHES):
        rows = [
            _random_row(draw, config.model.vocab_size, config.data.sequence_length + 1)
            for _ in range(config.train.micro_batch_size)
        ]
        batch = make_batch(rows, config.model.mask_documents)
        batches.append(batch.pin_memory() if device.type == "cuda" else batch)
    return batches


def attended_pairs(config: Config) -> float:
    """Pairs of a token and one that its attention sees within its document, in the mean of `random_batches`."""
    masked = dataclasses.replace(config, model=dataclasses.replace(config.model, mask_documents=True))
    return sum(batch.attended_pairs for batch in random_batches(masked, torch.device("cpu"))) / NUM_BATCHES


def _random_row(draw: np.random.Generator, vocab_size: int, length: int) -> Sample:
    lengths = draw.geometric(1 / MEAN_DOCUMENT, size=length)
    document_ids = np.repeat(np.arange(length, dtype=np.int32), lengths)[:length]
    return Sample(draw.integers(vocab_size, size=length), document_ids)
