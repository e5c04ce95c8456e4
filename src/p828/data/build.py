"""What a run is fed with, put together from its configuration: training batches, validation batches, plain text."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p828.config import Config, DataConfig
from p828.data.loader import Batch, Loader, make_batch
from p828.data.mixture import SampleOrder, SampleSource
from p828.data.retry import Retry
from p828.data.sample import Sample
from p828.data.shuffle import SampleShuffler
from p828.data.streams import Streams
from p828.data.text.best_fit_packer import BestFitPacker
from p828.data.text.documents import held_out_words, open_in_order, open_training, open_validation
from p828.data.text.packing import Packer, Packing
from p828.data.tokenizer import Tokenizer
from p828.data.tokens.format import MANIFEST_FILE, TOKENIZER_FILE, open_manifest
from p828.data.tokens.read import Prepared, ShuffledTokenDataset
from p828.data.tokens.settings import check_settings, data_settings
from p828.errors import ConfigError


def open_loader(
    config: Config,
    tokenizer: Tokenizer,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    tell: Callable[[str], None] = lambda text: None,
    part: tuple[int, int] = (0, 1),
) -> Loader:
    """A rank's training batches from the beginning. `tell` is given a line when a read has failed and is repeated.

    `part` is the rank's number among those that compare the same prepared files, and theirs; each compares a part.
    Raises ConfigError if the data cannot be opened.
    """
    cancelled = threading.Event()
    retry = Retry(config.data.read_retries, cancelled.wait, tell)
    sources = [
        _open_source(data, source_seed(config.train.seed, number), tokenizer, retry, part)
        for number, data in enumerate(config.data.sources)
    ]
    weights = zip(*(mixed.weights for mixed in config.data.mixture), strict=True) if config.data.mixture else [(1.0,)]
    schedule = list(zip(config.data.mixture_steps, weights, strict=True))
    batches_per_step = config.train.gradient_accumulation * world_size
    rows = SampleOrder(sources, schedule, config.train.micro_batch_size, batches_per_step, rank, world_size)
    return Loader(rows, config.model.mask_documents, pin_memory, len(sources), cancelled, tell)


def _open_source(
    data: DataConfig, seed: int, tokenizer: Tokenizer, retry: Retry, files: tuple[int, int]
) -> SampleSource:
    if data.prepared:
        return ShuffledTokenDataset(open_prepared(data, tokenizer), data.sequence_length, seed, retry, files)
    packer: type[Packer] | type[BestFitPacker] = Packer if data.packing == "concatenate" else BestFitPacker
    by_end = open_in_order(data, retry).by_end
    if data.streams > 1 and (data.source != "hf" or Path(data.hub_name).is_dir()):
        one_by_one = replace(data, block_documents=1)
        for part in range(data.streams):  # a part without a document would end the run at its first batch from there
            next(open_training(one_by_one, seed, part=part, parts=data.streams, retry=retry, by_end=by_end))
    streams, rows = [], []
    for part in range(data.streams):
        own_seed = source_seed(seed, part)
        documents = open_training(data, own_seed, part=part, parts=data.streams, retry=retry, by_end=by_end)
        maker: Packing = packer(documents, tokenizer, data.sequence_length)
        streams.append(documents)
        rows.append(SampleShuffler(maker, max(data.shuffle_rows // data.streams, 1), own_seed))
    return Streams(rows, streams)


def source_seed(seed: int, number: int) -> int:
    """A seed for each of several sources or streams, lest all shuffle alike; the run's own for the first."""
    return int(np.random.PCG64((seed, number)).random_raw()) if number else seed


def open_prepared(data: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """Raises ConfigError if it is none, or prepared with another tokenizer, from another source or for other rows."""
    prepared = Prepared.open(Path(data.prepared), tokenizer)
    check_settings(prepared.manifest.settings, {"data": data_settings(data)}, prepared.directory / MANIFEST_FILE)
    return prepared


def prepared_tokenizer(config: Config) -> Tokenizer | None:
    """The one that came with prepared data; None if there is none, or the configuration names a file of its own.

    Raises ConfigError if the data was prepared with a tokenizer of other settings.
    """
    directories = [Path(data.prepared) for data in config.data.sources if data.prepared]
    is_file = config.tokenizer.name != "train" and Path(config.tokenizer.name).expanduser().exists()
    if not directories or is_file:
        return None
    made = open_manifest(directories[0]).settings["tokenizer"]
    keys = ("name", "vocab_size", "eos_token") if config.tokenizer.name == "train" else ("name", "eos_token")
    for key in keys:
        now = getattr(config.tokenizer, key)
        if made[key] != now:
            where = directories[0] / MANIFEST_FILE
            raise ConfigError(f"{where}: prepared with tokenizer.{key} = {made[key]!r}, not {now!r}")
    return Tokenizer.from_file(directories[0] / TOKENIZER_FILE, config.tokenizer.eos_token)


def validation_batches(
    config: Config,
    tokenizer: Tokenizer,
    rows: int,
    micro_batch_size: int,
    rules: Sequence[bool | None] = (),
    part: tuple[int, int] = (0, 1),
    tell: Callable[[str], None] = lambda text: None,
) -> list[Batch]:
    """The first `rows` rows of the validation documents, fewer if there are fewer, the last one of a source padded.

    Of prepared data it is rows from all over them, the same ones in every run. A mixture's sources give equal shares,
    whatever their weights. The rows do not depend on `micro_batch_size`; the last batch may have fewer than that.
    `rules` say of each source by which rule its text is held out (`mixture.held_out_rules`), if that is settled.
    `part` and `tell` are as in `open_loader`. Raises ConfigError if there is no validation text.
    """
    sources, validation = config.data.sources, config.data.validation
    if validation.kind == "files" or (validation.kind == "split" and validation.hub_name):
        sources = sources[:1]  # the same text for all
    shares = [rows // len(sources) + (i < rows % len(sources)) for i in range(len(sources))]
    chosen = [
        row
        for data, share, by_end in zip(sources, shares, rules or [None] * len(sources), strict=False)
        if share
        for row in _validation_rows(data, tokenizer, share, by_end, part, tell)
    ]
    mask = config.model.mask_documents
    return [make_batch(chosen[i : i + micro_batch_size], mask) for i in range(0, len(chosen), micro_batch_size)]


def all_validation_batches(
    config: Config, tokenizer: Tokenizer, micro_batch_size: int, tell: Callable[[str], None] = lambda text: None
) -> Iterator[Batch]:
    """Every row of the validation documents that are read as text, as they are read, the last one padded.

    `tell` is as in `open_loader`. Raises ConfigError if there is no validation text.
    """
    data = config.data.sources[0]
    rows = _read_rows(data, tokenizer, Retry(data.read_retries, tell=tell))
    while chosen := list(islice(rows, micro_batch_size)):
        yield make_batch(chosen, config.model.mask_documents)


def _validation_rows(
    data: DataConfig,
    tokenizer: Tokenizer,
    count: int,
    by_end: bool | None,
    part: tuple[int, int],
    tell: Callable[[str], None],
) -> list[Sample]:
    retry = Retry(data.read_retries, tell=tell)
    if data.prepared:
        rows = open_prepared(data, tokenizer).validation_rows(count, data.sequence_length, retry, part)
        return [replace(row, text_bytes=tokenizer.spelled_bytes(row.tokens, row.document_ids)) for row in rows]
    return list(islice(_read_rows(data, tokenizer, retry, by_end), count))


def _read_rows(data: DataConfig, tokenizer: Tokenizer, retry: Retry, by_end: bool | None = None) -> Iterator[Sample]:
    """Raises ConfigError if there is none."""
    documents = open_validation(data, retry, by_end)
    packer = Packer(documents, tokenizer, data.sequence_length, counts_bytes=True)
    is_empty = True
    for row in packer:
        is_empty = False
        yield row
    rest = packer.remainder()
    if rest is not None and len(rest.tokens) > 1:
        is_empty = False
        yield rest.padded(data.sequence_length + 1, tokenizer.eos_id)
    if is_empty:
        raise ConfigError(f"no text to validate on in {packer.stream.source}")


def held_out_lines(config: Config, rules: Sequence[bool | None] = ()) -> list[str]:
    """What is never trained on, a line for each source that is read as text. `rules` as of `validation_batches`."""
    pairs = zip(config.data.sources, rules or [None] * len(config.data.sources), strict=False)
    return [words for data, by_end in pairs if not data.prepared and (words := held_out_words(data, by_end))]


def training_rows(
    config: Config, tokenizer: Tokenizer, rules: Sequence[bool | None]
) -> Iterator[npt.NDArray[np.int64]]:
    """The tokens of one epoch of every source, in rows. `rules` as of `validation_batches`, one for each source."""
    for data, by_end in zip(config.data.sources, rules, strict=True):
        if data.prepared:
            tokens = open_prepared(data, tokenizer).tokens("training")
            length = data.sequence_length + 1
            yield from (tokens.row(start, length, 0).tokens for start in range(0, len(tokens) - length + 1, length))
        else:
            documents = open_training(data, config.train.seed, epochs=1, by_end=by_end)
            packer = Packer(documents, tokenizer, data.sequence_length)
            yield from (row.tokens for row in packer)


def training_documents(config: Config) -> Iterator[str]:
    """One epoch of every source's text, a document of each in turn."""
    streams = [
        open_training(data, config.train.seed, epochs=1, retry=Retry(data.read_retries)) for data in config.data.sources
    ]
    while streams:
        documents = [(stream, next(stream, None)) for stream in streams]
        yield from (text for _, text in documents if text is not None)
        streams = [stream for stream, text in documents if text is not None]
