"""The order of rows over ranks, ends of processes and other numbers of ranks, from every kind of source."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_samples import open_run_loader, text, write_jsonl

from p828.config import Config, DataConfig, MixedSource, TrainConfig, ValidationConfig
from p828.data.batch import PADDING, Sample
from p828.data.loader import open_prepared
from p828.data.order import merged
from p828.data.text import packing
from p828.data.text.documents import is_held_out
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.prepare import prepare
from p828.errors import ConfigError

LENGTH = 31
BATCHES_PER_STEP = 24  # over all ranks
MICRO_BATCH = 2
SHARE = 0.1


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    for shard, count in enumerate((40, 3, 60, 25, 1, 33)):
        write_jsonl(directory / f"{shard}.jsonl", [text(100 * shard + i) for i in range(count)])
    return directory


def base(texts: Path, files: str = "*.jsonl") -> DataConfig:
    return DataConfig(
        source="files",
        files=(str(texts / files),),
        sequence_length=LENGTH,
        block_documents=9,
        shuffle_rows=16,
        validation=ValidationConfig(fraction=SHARE),
    )


@pytest.fixture(scope="module")
def configs(texts: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    data = base(texts)
    prepared = tmp_path_factory.mktemp("prepared")
    settings = Config(data=data, train=TrainConfig(micro_batch_size=MICRO_BATCH, seed=3))
    for name in ("concatenate", "best_fit"):
        packed = dataclasses.replace(settings, data=dataclasses.replace(data, packing=name))
        prepare(packed, prepared / name, tokenizer, lambda preparation: None)
    mixture = (
        MixedSource(
            name="prepared",
            weights=(1.0, 0.3),
            prepared=str(prepared / "concatenate"),
            source="files",
            files=data.files,
        ),
        MixedSource(name="text", weights=(0.5, 0.7), source="files", files=(str(texts / "[0-2].jsonl"),)),
    )
    kinds: dict[str, dict[str, Any]] = {
        "prepared": {"prepared": str(prepared / "concatenate")},
        "prepared by best fit": {"prepared": str(prepared / "best_fit"), "packing": "best_fit"},
        "one stream": {},
        "streams": {"streams": 4},
        "more streams than shards": {"streams": 8},
        "streams by best fit": {"streams": 2, "packing": "best_fit"},
        "mixture": {"streams": 2, "mixture": mixture, "mixture_steps": (0, 7)},
    }
    return {
        name: dataclasses.replace(settings, data=dataclasses.replace(data, **changes))
        for name, changes in kinds.items()
    }


KINDS = [
    "prepared", "prepared by best fit", "one stream", "streams", "more streams than shards", "streams by best fit",
    "mixture",
]  # fmt: skip


def ranks(config: Config, tokenizer: Tokenizer, world_size: int, state: dict[str, Any] | None) -> list[Any]:
    """Each rank's micro-batches from a state on, which has been through JSON as in a checkpoint."""
    accumulation = BATCHES_PER_STEP // world_size
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_accumulation=accumulation))
    opened = [open_run_loader(config, tokenizer, rank=rank, world_size=world_size).order for rank in range(world_size)]
    if state is not None:
        for rows in opened:
            rows.load_state_dict(json.loads(json.dumps(state)))
    return opened


def steps(opened: list[Any]) -> Iterator[list[Sample]]:
    """The rows of each step, in the global order of micro-batches."""
    while True:
        yield [row for i in range(BATCHES_PER_STEP) for row in next(opened[i % len(opened)])]


def content(rows: list[Sample]) -> list[tuple[bytes, bytes, int]]:
    return [(row.tokens.tobytes(), row.document_ids.tobytes(), row.epoch) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_any_ranks_and_kills_give_one_sequence(configs: dict[str, Config], tokenizer: Tokenizer, kind: str) -> None:
    config = configs[kind]
    expected = [content(rows) for rows, _ in zip(steps(ranks(config, tokenizer, 1, None)), range(20), strict=False)]
    draw = random.Random(kind)
    done, state = 0, None
    while done < 20:
        opened = ranks(config, tokenizer, draw.choice((1, 2, 3, 4, 6, 8)), state)
        sequence = steps(opened)
        for _ in range(min(draw.randrange(4), 20 - done)):
            assert content(next(sequence)) == expected[done]
            done += 1
        state = merged([rows.state_dict() for rows in opened])
        for _ in range(draw.randrange(3)):  # work that the kill undoes
            next(sequence)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_every_token_comes_once_an_epoch(
    configs: dict[str, Config], texts: Path, tokenizer: Tokenizer, kind: str
) -> None:
    documents = [json.loads(line)["text"] for file in sorted(texts.iterdir()) for line in file.read_text().splitlines()]
    kept = [document for document in documents if document and not is_held_out(document, SHARE)]
    expected = Counter(token for document in kept for token in [*tokenizer.encode(document), tokenizer.eos_id])
    seen = {epoch: Counter[int]() for epoch in range(3)}
    draw = random.Random(kind)
    state = None
    epochs = [0] * 200
    while min(epochs[-100:]) < 3:
        opened = ranks(configs[kind], tokenizer, draw.choice((1, 2, 3, 4, 6, 8)), state)
        for _, rows in zip(range(draw.randrange(1, 3)), steps(opened), strict=False):
            for row in rows:
                epochs.append(row.epoch)
                if row.epoch in seen:
                    seen[row.epoch].update(row.tokens[row.document_ids != PADDING].tolist())
        state = merged([rows.state_dict() for rows in opened])
    if kind in ("one stream", "streams", "more streams than shards"):
        # The row in which a stream's epoch ends goes on with the next epoch, and counts to the first.
        excess = Counter(sum(seen.values(), Counter[int]()))
        excess.subtract({token: 3 * count for token, count in expected.items()})
        assert min(excess.values()) >= 0
        assert excess.total() <= configs[kind].data.streams * LENGTH
    else:
        assert seen == {0: expected, 1: expected, 2: expected}


@pytest.mark.parametrize("points", [100, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["prepared", "streams", "mixture"])
def test_random_points_go_on_as_before(
    configs: dict[str, Config], tokenizer: Tokenizer, kind: str, points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 4)  # a resume tokenizes no more than it needs
    opened = ranks(configs[kind], tokenizer, 1, None)
    states, sequence = [opened[0].state_dict()], []
    for rows, _ in zip(steps(opened), range(75), strict=False):
        states.append(opened[0].state_dict())
        sequence += content(rows)
    draw = random.Random(kind)
    resumed = ranks(configs[kind], tokenizer, 1, None)
    per_step = BATCHES_PER_STEP * MICRO_BATCH
    for _ in range(points):
        step = draw.randrange(75 - 3)
        resumed[0].load_state_dict(json.loads(json.dumps(states[step])))
        rows = [row for _ in range(50 // MICRO_BATCH) for row in next(resumed[0])]
        assert content(rows) == sequence[step * per_step : step * per_step + 50]


def test_prepared_rows_of_an_epoch_are_a_permutation(configs: dict[str, Config], tokenizer: Tokenizer) -> None:
    config = configs["prepared"]
    tokens = open_prepared(config.data, tokenizer).tokens("training")
    in_order = [tokens.sample(start, LENGTH + 1, 0).tokens.tobytes() for start in range(0, len(tokens), LENGTH + 1)]
    opened = ranks(config, tokenizer, 1, None)
    given = [row.tokens.tobytes() for rows, _ in zip(steps(opened), range(40), strict=False) for row in rows]
    first, second = given[: len(in_order)], given[len(in_order) : 2 * len(in_order)]
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != in_order
    assert first != second


def test_other_prepared_data_is_refused(configs: dict[str, Config], tokenizer: Tokenizer) -> None:
    state = ranks(configs["prepared"], tokenizer, 1, None)[0].state_dict()
    with pytest.raises(ConfigError, match="not the data of the checkpoint"):
        ranks(configs["prepared by best fit"], tokenizer, 1, state)
