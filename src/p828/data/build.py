"""What else a run takes from its data section: validation batches, plain text, and the tokenizer of prepared data.

Training batches are `loader.open_loader`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p828.config import DataConfig, TokenizerConfig
from p828.data.batch import Batch, Sample
from p828.data.loader import make_batch, open_prepared
from p828.data.retry import Retry
from p828.data.text.open import held_out_words, open_training, open_validation
from p828.data.text.packing import Packer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.format import MANIFEST_FILE, TOKENIZER_FILE, open_manifest
from p828.errors import ConfigError


def prepared_tokenizer(data: DataConfig, config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer of prepared data; None if no source is prepared, or `config` names a file.

    Raises ConfigError if the data was prepared with a tokenizer of other settings.
    """
    directories = [Path(source.prepared) for source in data.sources if source.prepared]
    is_file = config.name != "train" and Path(config.name).expanduser().exists()
    if not directories or is_file:
        return None
    made = open_manifest(directories[0]).settings["tokenizer"]
    keys = ("name", "vocab_size", "eos_token") if config.name == "train" else ("name", "eos_token")
    for key in keys:
        now = getattr(config, key)
        if made[key] != now:
            where = directories[0] / MANIFEST_FILE
            raise ConfigError(f"{where}: prepared with tokenizer.{key} = {made[key]!r}, not {now!r}")
    return Tokenizer.from_file(directories[0] / TOKENIZER_FILE, config.eos_token)


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    mask_documents: bool,
    rows: int,
    micro_batch_size: int,
    rules: Sequence[bool | None] = (),
    part: tuple[int, int] = (0, 1),
    report: Callable[[str], None] = lambda text: None,
) -> list[Batch]:
    """The first `rows` samples of the validation documents, or fewer if there are fewer; a source's last one is padded.

    Of prepared data they come from all over it, and are the same in every run. A mixture's sources give equal numbers,
    whatever their weights. The samples do not depend on `micro_batch_size`; the last batch may have fewer than that.
    `rules` say of each source by which rule its text is held out (`order.held_out_rules`), if that is settled.
    `part` and `report` are as in `open_loader`. Raises ConfigError if there is no validation text.
    """
    sources, validation = config.sources, config.validation
    if validation.kind == "files" or (validation.kind == "split" and validation.hub_name):
        sources = sources[:1]  # the same text for all
    counts = [rows // len(sources) + (i < rows % len(sources)) for i in range(len(sources))]
    chosen = [
        sample
        for data, count, by_end in zip(sources, counts, rules or [None] * len(sources), strict=False)
        if count
        for sample in _validation_samples(data, tokenizer, count, by_end, part, report)
    ]
    size = micro_batch_size
    return [make_batch(chosen[i : i + size], mask_documents) for i in range(0, len(chosen), size)]


def all_validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    mask_documents: bool,
    micro_batch_size: int,
    report: Callable[[str], None] = lambda text: None,
) -> Iterator[Batch]:
    """Every sample of the validation documents that are read as text, as they are read, the last one padded.

    `report` is as in `open_loader`. Raises ConfigError if there is no validation text.
    """
    data = config.sources[0]
    samples = _read_samples(data, tokenizer, Retry(data.read_retries, report=report))
    while chosen := list(islice(samples, micro_batch_size)):
        yield make_batch(chosen, mask_documents)


def _validation_samples(
    data: DataConfig,
    tokenizer: Tokenizer,
    count: int,
    by_end: bool | None,
    part: tuple[int, int],
    report: Callable[[str], None],
) -> list[Sample]:
    retry = Retry(data.read_retries, report=report)
    if not data.prepared:
        return list(islice(_read_samples(data, tokenizer, retry, by_end), count))
    prepared = open_prepared(data, tokenizer)
    samples = prepared.validation_samples(count, data.sequence_length, retry, part)
    if not prepared.manifest.tells_bytes:
        return samples
    return [replace(one, text_bytes=tokenizer.spelled_bytes(one.tokens, one.document_ids)) for one in samples]


def _read_samples(data: DataConfig, tokenizer: Tokenizer, retry: Retry, by_end: bool | None = None) -> Iterator[Sample]:
    """Raises ConfigError if there is none."""
    documents = open_validation(data, retry, by_end)
    packer = Packer(documents, tokenizer, data.sequence_length, counts_bytes=True)
    is_empty = True
    for sample in packer:
        is_empty = False
        yield sample
    rest = packer.remainder()
    if rest is not None and len(rest.tokens) > 1:
        is_empty = False
        yield rest.padded(data.sequence_length + 1, tokenizer.eos_id)
    if is_empty:
        raise ConfigError(f"no text to validate on in {packer.stream.source}")


def held_out_lines(config: DataConfig, rules: Sequence[bool | None] = ()) -> list[str]:
    """What is never trained on, a line for each source that is read as text. `rules` as of `validation_batches`."""
    pairs = zip(config.sources, rules or [None] * len(config.sources), strict=False)
    return [words for data, by_end in pairs if not data.prepared and (words := held_out_words(data, by_end))]


def training_rows(
    config: DataConfig, seed: int, tokenizer: Tokenizer, rules: Sequence[bool | None]
) -> Iterator[npt.NDArray[np.int64]]:
    """The tokens of one epoch of every source, a sample's at a time. `rules` has one of each source."""
    for data, by_end in zip(config.sources, rules, strict=True):
        if data.prepared:
            tokens = open_prepared(data, tokenizer).tokens("training")
            length = data.sequence_length + 1
            yield from (tokens.sample(start, length, 0).tokens for start in range(0, len(tokens) - length + 1, length))
        else:
            documents = open_training(data, seed, epochs=1, by_end=by_end)
            packer = Packer(documents, tokenizer, data.sequence_length)
            yield from (sample.tokens for sample in packer)


def training_documents(config: DataConfig, seed: int) -> Iterator[str]:
    """One epoch of every source's text, a document of each in turn."""
    streams = [open_training(data, seed, epochs=1, retry=Retry(data.read_retries)) for data in config.sources]
    while streams:
        documents = [(stream, next(stream, None)) for stream in streams]
        yield from (text for _, text in documents if text is not None)
        streams = [stream for stream, text in documents if text is not None]
