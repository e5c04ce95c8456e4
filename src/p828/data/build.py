"""What else a run takes from its data section: validation batches, plain text, and the tokenizer of prepared data.

Training batches are `loader.open_loader`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p828.config import Config, DataConfig, TokenizerConfig
from p828.data.batch import PADDING, Batch, Sample
from p828.data.loader import make_batch, open_prepared
from p828.data.retry import Retry
from p828.data.text.conversation_packing import ConversationPacker, template_of
from p828.data.text.documents import DocumentStream
from p828.data.text.open import held_out_words, open_training, open_validation
from p828.data.text.packing import Packer
from p828.data.tokenizer.chat_template import ChatTemplate
from p828.data.tokenizer.marked_text import without_marks
from p828.data.tokenizer.of_run import load_tokenizer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.tokenizer_config import template_for, template_of_trained
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
    tokenizer = Tokenizer.from_file(directories[0] / TOKENIZER_FILE, config.eos_token)
    tokenizer.template = template_for(config, tokenizer.special_tokens, None, data.has_conversations)
    return tokenizer


def tokenizer_of(config: Config, saved: Path | None = None) -> Tokenizer:
    """The run's tokenizer as `load_tokenizer` gives it, with the run's text if it is to be trained."""

    def documents() -> Iterator[str]:
        template = template_of_trained(config.tokenizer, config.data.has_conversations)
        return training_documents(config.data, config.train.seed, template)

    is_chat = config.data.has_conversations
    return load_tokenizer(config.tokenizer, documents, config.model.vocab_size, saved, is_chat)


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
    sources = validation_sources(config)
    counts = [rows // len(sources) + (i < rows % len(sources)) for i in range(len(sources))]
    chosen = [
        sample
        for data, count, by_end in zip(sources, counts, rules or [None] * len(sources), strict=False)
        if count
        for sample in _validation_samples(data, tokenizer, count, by_end, part, report)
    ]
    size = micro_batch_size
    return [make_batch(chosen[i : i + size], mask_documents) for i in range(0, len(chosen), size)]


def validation_sources(config: DataConfig) -> tuple[DataConfig, ...]:
    """The sources that have validation text of their own; else the first, whose fields the one text for all is in."""
    validation = config.validation
    is_one = validation.kind == "files" or (validation.kind == "split" and validation.hub_name)
    return config.sources[:1] if is_one else config.sources


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
    documents = open_validation(data, retry, by_end, template_of(data, tokenizer))
    packer = _in_order(data, documents, tokenizer, counts_bytes=True)
    is_empty = True
    for sample in packer:
        is_empty = False
        yield sample
    rest = packer.remainder() if isinstance(packer, Packer) else None
    if rest is not None and len(rest.tokens) > 1:
        is_empty = False
        yield rest.padded(data.sequence_length + 1, tokenizer.eos_id)
    if is_empty:
        raise ConfigError(f"no text to validate on in {packer.stream.source}")


def _in_order(
    data: DataConfig, documents: DocumentStream, tokenizer: Tokenizer, counts_bytes: bool = False
) -> Packer | ConversationPacker:
    if data.messages_field:
        return ConversationPacker(documents, tokenizer, data.sequence_length)
    return Packer(documents, tokenizer, data.sequence_length, counts_bytes)


def held_out_lines(config: DataConfig, rules: Sequence[bool | None] = ()) -> list[str]:
    """What is never trained on, a line for each source that is read as text. `rules` as of `validation_batches`."""
    pairs = zip(config.sources, rules or [None] * len(config.sources), strict=False)
    return [words for data, by_end in pairs if not data.prepared and (words := held_out_words(data, by_end))]


def template_lines(config: DataConfig, tokenizer: Tokenizer) -> list[str]:
    """A line on how conversations are written, if there are any."""
    template = tokenizer.template
    if template is None or not config.has_conversations:
        return []
    return [
        f"conversations are written by the chat template {template.name}; an answer ends in {template.end_of_turn!r}"
    ]


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
            template = template_of(data, tokenizer)
            documents = open_training(data, seed, epochs=1, by_end=by_end, template=template)
            for sample in _in_order(data, documents, tokenizer):
                yield sample.tokens[sample.document_ids != PADDING]


def training_documents(config: DataConfig, seed: int, template: ChatTemplate | None = None) -> Iterator[str]:
    """One epoch of every source's text, a document of each in turn; conversations without control tokens.

    `template` is the one that conversations are trained with, so that what is held out is the same.
    """
    streams: list[Iterator[str]] = []
    for data in config.sources:
        texts = open_training(data, seed, epochs=1, retry=Retry(data.read_retries), template=template)
        if data.messages_field:
            streams.append(map(template.control.plain if template else without_marks, texts))
        else:
            streams.append(texts)
    while streams:
        documents = [(stream, next(stream, None)) for stream in streams]
        yield from (text for _, text in documents if text is not None)
        streams = [stream for stream, text in documents if text is not None]
