import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from p828.config import Config
from p828.data.batch import Sample
from p828.data.order import SampleShuffler
from p828.data.text.open import open_training
from p828.data.text.packing import Packer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from runs import run_config

ROWS = 8


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return run_config(tmp_path)


@pytest.fixture
def tokenizer(config: Config) -> Tokenizer:
    return train_tokenizer(config.tokenizer, open_training(config.data, 0, epochs=1))


def packer(config: Config, tokenizer: Tokenizer) -> Packer:
    return Packer(open_training(config.data, seed=0), tokenizer, config.data.sequence_length)


def take(rows: Packer | SampleShuffler, count: int) -> list[bytes]:
    return [_bytes(next(rows)) for _ in range(count)]


def _bytes(row: Sample) -> bytes:
    return row.tokens.tobytes() + row.document_ids.tobytes()


def test_every_block_holds_the_packers_rows_once_in_another_order(config: Config, tokenizer: Tokenizer) -> None:
    shuffler, plain = SampleShuffler(packer(config, tokenizer), ROWS, seed=0), packer(config, tokenizer)
    orders = []
    for _ in range(5):
        shuffled, expected = take(shuffler, ROWS), take(plain, ROWS)
        assert sorted(shuffled) == sorted(expected)
        orders.append([expected.index(row) for row in shuffled])
    assert len({tuple(order) for order in orders}) == 5
    assert list(range(ROWS)) not in orders


def test_no_row_comes_again_before_all_have_come(config: Config, tokenizer: Tokenizer) -> None:
    """Blocks end with the epoch, also when they are larger than it."""
    plain = packer(config, tokenizer)
    rows = list(itertools.takewhile(lambda row: row.epoch < 2, plain))
    epochs = [[_bytes(row) for row in rows if row.epoch == epoch] for epoch in (0, 1)]
    for size in (7, ROWS, len(epochs[0]), 1000):
        shuffler = SampleShuffler(packer(config, tokenizer), size, seed=0)
        for epoch in epochs:
            assert sorted(take(shuffler, len(epoch))) == sorted(epoch)


def test_the_seed_decides_the_order(config: Config, tokenizer: Tokenizer) -> None:
    first, again, other = (take(SampleShuffler(packer(config, tokenizer), ROWS, seed), ROWS) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_blocks_of_one_keep_the_order(config: Config, tokenizer: Tokenizer) -> None:
    assert take(SampleShuffler(packer(config, tokenizer), 1, seed=0), 20) == take(packer(config, tokenizer), 20)


@pytest.mark.parametrize("rows", [ROWS, 50, 1000])
def test_two_resumes_give_the_same_rows(config: Config, tokenizer: Tokenizer, rows: int) -> None:
    def shuffler() -> SampleShuffler:
        return SampleShuffler(packer(config, tokenizer), rows, seed=0)

    whole = take(shuffler(), 230)
    draw = random.Random(0)
    for before, between in [(0, 0), (8, 8), (8, 0), *((draw.randrange(100), draw.randrange(100)) for _ in range(15))]:
        first, second, third = shuffler(), shuffler(), shuffler()
        assert take(first, before) == whole[:before]
        second.load_state_dict(first.state_dict())
        assert take(second, between) == whole[before : before + between]
        third.load_state_dict(second.state_dict())
        assert take(third, 30) == whole[before + between :][:30]


def test_rows_do_not_change_after_they_were_given(config: Config, tokenizer: Tokenizer) -> None:
    shuffler = SampleShuffler(packer(config, tokenizer), ROWS, seed=0)
    row = next(shuffler)
    copy = np.array(row.tokens)
    take(shuffler, 50)
    assert np.array_equal(row.tokens, copy)
