"""The batches that the bench makes up."""

import pytest
import torch

from p828.bench.batches import MEAN_DOCUMENT, NUM_BATCHES, attended_pairs, random_batches
from p828.config import Config, DataConfig, TrainConfig
from tiny import tiny_config


def test_documents_vary_around_their_mean() -> None:
    length = 20_000
    config = Config(model=tiny_config(), data=DataConfig(sequence_length=length), train=TrainConfig(micro_batch_size=3))
    batches = random_batches(config, torch.device("cpu"))
    assert len(batches) == NUM_BATCHES
    assert not torch.equal(batches[0].tokens_BS, batches[1].tokens_BS)
    starts = sum(int((batch.positions_BS == 0).sum()) for batch in batches)
    # Geometric lengths: their number in N tokens has mean N / 300 and nearly that variance; 800 ± 5 · 28.
    assert abs(starts - NUM_BATCHES * 3 * length / MEAN_DOCUMENT) < 5 * 28
    for batch in batches:
        assert batch.num_targets == 3 * length
        assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])
        assert int(batch.tokens_BS.max()) < config.model.vocab_size


@pytest.mark.parametrize("mask_documents", [True, False])
def test_pairs_are_those_within_documents_whatever_a_system_masks(mask_documents: bool) -> None:
    model = tiny_config(mask_documents=mask_documents)
    config = Config(model=model, data=DataConfig(sequence_length=700), train=TrainConfig(micro_batch_size=2))
    masks = [
        batch.document_ids_BS[:, :, None] == batch.document_ids_BS[:, None, :]
        for batch in random_batches(config, torch.device("cpu"))
    ]
    assert attended_pairs(config) == sum(int(mask_BSS.tril().sum()) for mask_BSS in masks) / NUM_BATCHES
