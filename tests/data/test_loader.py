import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import open_run_loader, text, write_jsonl

from p828.config import Config, DataConfig, TrainConfig, ValidationConfig
from p828.data.batch import PADDING, Batch, Sample
from p828.data.build import validation_batches
from p828.data.loader import Loader, make_batch
from p828.data.order import SampleOrder, SampleShuffler, TextStreams
from p828.data.text.open import open_training, open_validation
from p828.data.text.packing import Packer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import DataError, TransientReadError

LENGTH = 31


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_jsonl(tmp_path / "a.jsonl", [text(i) for i in range(60)])
    write_jsonl(tmp_path / "v.jsonl", [text(100 + i) for i in range(9)])
    validation = ValidationConfig(kind="files", files=(str(tmp_path / "v.jsonl"),))
    data = DataConfig(
        source="files",
        files=(str(tmp_path / "a.jsonl"),),
        sequence_length=LENGTH,
        block_documents=7,
        validation=validation,
    )
    return Config(data=data, train=TrainConfig(micro_batch_size=3))


def in_batches(packer: Packer, micro_batch_size: int) -> SampleOrder:
    unshuffled = TextStreams([SampleShuffler(packer, 1, seed=0)])
    return SampleOrder([unshuffled], [(0, [1.0])], micro_batch_size, batches_per_step=1)


def equal(one: Batch, other: Batch) -> bool:
    return one.num_targets == other.num_targets and all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("tokens_BS", "targets_BS", "positions_BS", "document_ids_BS")
    )


def test_batches_are_the_rows(config: Config, tokenizer: Tokenizer) -> None:
    packer = Packer(open_training(config.data, seed=0), tokenizer, LENGTH)
    shuffler = SampleShuffler(packer, config.data.shuffle_rows, config.train.seed)
    with open_run_loader(config, tokenizer) as loader:
        for batch, _ in zip(loader, range(20), strict=False):
            rows = [next(shuffler) for _ in range(3)]
            assert batch.tokens_BS.tolist() == [row.tokens[:-1].tolist() for row in rows]
            assert batch.targets_BS.tolist() == [row.tokens[1:].tolist() for row in rows]
            assert batch.document_ids_BS.tolist() == [row.document_ids[:-1].tolist() for row in rows]
            assert batch.num_targets == 3 * LENGTH
            for name in ("tokens_BS", "targets_BS", "positions_BS"):
                assert getattr(batch, name).dtype == torch.int64
            assert batch.document_ids_BS.dtype == torch.int32


@pytest.mark.parametrize("mask_documents", [True, False])
def test_positions(config: Config, tokenizer: Tokenizer, mask_documents: bool) -> None:
    packer = Packer(open_training(config.data, seed=0), tokenizer, LENGTH)
    with Loader(in_batches(packer, 4), mask_documents) as loader:
        batches = [next(loader) for _ in range(10)]
    several = 0
    for batch in batches:
        for tokens, positions in zip(batch.tokens_BS.tolist(), batch.positions_BS.tolist(), strict=True):
            expected, position = [], 0
            for token in tokens:
                expected.append(position)
                position = 0 if mask_documents and token == tokenizer.eos_id else position + 1
            assert positions == expected
            several += tokenizer.eos_id in tokens[:-1]
    assert several > 5


def test_the_state_is_that_of_the_last_batch_handed_out(config: Config, tokenizer: Tokenizer) -> None:
    with open_run_loader(config, tokenizer) as loader:
        states, batches = [loader.state_dict()], []
        for _ in range(30):
            batches.append(next(loader))
            states.append(loader.state_dict())
    for stop in (0, 1, 2, 13, 29):
        with open_run_loader(config, tokenizer) as loader:
            loader.load_state_dict(json.loads(json.dumps(states[stop])))
            assert loader.state_dict() == states[stop]
            for i in range(stop, 30):
                assert equal(next(loader), batches[i])
                assert loader.state_dict() == states[i + 1]


def test_close_ends_the_thread_while_batches_wait(config: Config, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    loader = open_run_loader(config, tokenizer)
    loader.close()
    with open_run_loader(config, tokenizer) as loader:
        next(loader)
        assert threading.active_count() == before + 1
        while not loader._made.full():
            pass  # the thread has no room, and would wait for ever to put the next batch
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


class Hanging:
    """Micro-batches of which the first alone is ever read."""

    def __init__(self, rows: SampleOrder) -> None:
        self.rows, self.may_go_on, self.is_first = rows, threading.Event(), True

    def __next__(self) -> list[Sample]:
        if not self.is_first:
            self.may_go_on.wait()
        self.is_first = False
        return next(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


def test_a_read_that_hangs_is_waited_for_neither_at_a_stop_nor_at_the_end(config: Config, tokenizer: Tokenizer) -> None:
    rows = Hanging(in_batches(Packer(open_training(config.data, seed=0), tokenizer, LENGTH), 3))
    with Loader(rows, mask_documents=True) as loader:
        next(loader)
        before = loader.state_dict()
        loader.cancel()
        with pytest.raises(TransientReadError, match="not waited for"):
            next(loader)
        assert loader.state_dict() == before
    assert loader._thread is not None
    assert loader._thread.is_alive()
    rows.may_go_on.set()
    loader._thread.join()


def test_an_exception_in_the_thread_reaches_the_consumer(config: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"no": "text"}\n')
    with open_run_loader(config, tokenizer) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"a\.jsonl:61: no field 'text'"):
                for _ in loader:
                    pass


def test_moving_to_a_device_keeps_the_batch(config: Config, tokenizer: Tokenizer) -> None:
    (batch, *_) = validation_batches(config.data, tokenizer, True, 2, 2)
    assert equal(batch.to("cpu"), batch)
    assert batch.to(torch.device("meta")).tokens_BS.device.type == "meta"


@pytest.mark.parametrize("rest", [0, 1, 2, 7])
def test_the_last_validation_row_is_padded(config: Config, tokenizer: Tokenizer, rest: int) -> None:
    """`rest` tokens are left behind the full rows; a single one has nothing to predict and makes no row."""
    expected = [i for words in open_validation(config.data) for i in [*tokenizer.encode(words), tokenizer.eos_id]]
    size = next(size for size in range(10, len(expected)) if len(expected) % size == rest)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=size - 1))
    batches = validation_batches(config.data, tokenizer, True, 1000, 4)

    rows = len(expected) // size + (rest > 1)
    assert sum(len(batch.tokens_BS) for batch in batches) == rows
    assert {len(batch.tokens_BS) for batch in batches[:-1]} <= {4}
    assert sum(batch.num_targets for batch in batches) == len(expected) - rows - (rest == 1)
    for batch in batches:
        assert batch.num_targets == int((batch.targets_BS != -100).sum())
        assert torch.equal(batch.document_ids_BS == -1, batch.targets_BS == -100)
    if rest > 1:
        padding = size - rest
        assert batches[-1].tokens_BS[-1].tolist() == expected[-rest:] + [tokenizer.eos_id] * (padding - 1)
        assert batches[-1].targets_BS[-1].tolist() == expected[1 - rest :] + [-100] * padding


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_validation_rows_do_not_depend_on_the_batch(config: Config, tokenizer: Tokenizer, rows: int) -> None:
    def columns(micro_batch_size: int) -> list[list[list[int]]]:
        batches = validation_batches(config.data, tokenizer, True, rows, micro_batch_size)
        names = ("tokens_BS", "targets_BS", "positions_BS", "document_ids_BS")
        return [torch.cat([getattr(batch, name) for batch in batches]).tolist() for name in names]

    assert columns(1) == columns(3) == columns(64)
    assert rows == 1000 or len(columns(2)[0]) == rows


def test_no_text_to_validate_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "v.txt").write_text("")
    data = DataConfig(validation=ValidationConfig(kind="files", files=(str(tmp_path / "v.txt"),)))
    with pytest.raises(DataError, match=r"no documents in data\.validation\.files"):
        validation_batches(data, tokenizer, True, 4, 2)


def test_numpy_and_torch_share_no_memory_with_the_packer(config: Config, tokenizer: Tokenizer) -> None:
    packer = Packer(open_training(config.data, seed=0), tokenizer, LENGTH)
    with Loader(in_batches(packer, 3), mask_documents=True) as loader:
        first = next(loader)
        first.tokens_BS.zero_()
        first.targets_BS.zero_()
        second = next(loader)
    again = Packer(open_training(config.data, seed=0), tokenizer, LENGTH)
    rows = [next(again) for _ in range(6)]
    assert np.array_equal(second.tokens_BS.numpy(), np.stack([row.tokens[:-1] for row in rows[3:]]))


@pytest.mark.parametrize("mask_documents", [True, False])
def test_attended_pairs_are_those_that_the_mask_leaves(mask_documents: bool) -> None:
    """Counted one by one; padding, and the last token of a text, which has no target, left out."""
    lengths = [[3, 1, 6], [10], [1] * 10, [4, 2]]
    rows = []
    for documents in lengths:
        ids = np.repeat(np.arange(len(documents), dtype=np.int32), documents)
        rows.append(Sample(np.arange(10), np.pad(ids, (0, 10 - len(ids)), constant_values=PADDING)))
    batch = make_batch(rows, mask_documents)
    expected = 0
    for ids_S in batch.document_ids_BS.tolist():
        for query, document in enumerate(ids_S):
            keys = ids_S[: query + 1]
            expected += (keys.count(document) if mask_documents else query + 1) if document != PADDING else 0
    assert batch.attended_pairs == expected
    if mask_documents:  # in the last row five tokens have a target, in the others nine
        assert expected == (6 + 1 + 15) + 45 + 9 + (10 + 1)
