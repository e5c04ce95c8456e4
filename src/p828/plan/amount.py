"""How much text there is to train on, as far as it is known without reading it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p828.config import Config, DataConfig
from p828.data.fractions import planned_fractions
from p828.data.text.compression import COMPRESSIONS
from p828.data.text.files import FileShard, PythonShard, file_shards, python_shards
from p828.data.tokens.format import open_manifest
from p828.errors import ConfigError

# Bytes of text for a token, by the vocabulary from which on: byte-level BPE of 1,024, 4,096 and 16,384 tokens, trained
# on four fifths of 2.5 MB of Python's standard library and counted on the rest.
BYTES_PER_TOKEN = ((8192, 4.1), (2048, 3.6), (0, 2.7))
UNPACKED = 3.0  # bytes of text for a compressed one, about


@dataclass(frozen=True)
class SourceAmount:
    name: str
    """The source's name, as in records."""
    planned: float
    """Tokens that the whole run takes from it."""
    tokens: float | None
    """Of one epoch; None where that is not known without asking the network."""
    how: str
    """How the number was found, or why it was not."""

    @property
    def epochs(self) -> float | None:
        return self.planned / self.tokens if self.tokens else None


def source_amounts(config: Config, ranks: int) -> list[SourceAmount]:
    """Of every source. `config.train.steps` is the whole run's, and `tokens_per_step` each rank's.

    Raises ConfigError for prepared data that cannot be read.
    """
    planned = config.train.steps * config.tokens_per_step * ranks
    fractions = planned_fractions(config)
    vocabulary = config.tokenizer.vocab_size if config.tokenizer.name == "train" else config.model.vocab_size
    found = []
    for name, data, fraction in zip(config.data.source_names, config.data.sources, fractions, strict=True):
        tokens, how = _amount(data, vocabulary)
        found.append(SourceAmount(name, planned * fraction, tokens, how))
    return found


def _amount(data: DataConfig, vocabulary: int) -> tuple[float | None, str]:
    if data.prepared:
        return sum(shard.tokens for shard in open_manifest(Path(data.prepared)).training), "counted when prepared"
    if data.source == "hf":
        return None, "a hub data set, whose size is not asked for"
    try:
        shards: Sequence[FileShard] | Sequence[PythonShard] = (
            python_shards()
            if data.source == "python"
            else file_shards(data.files, data.text_field, "data.files", data.max_document_megabytes * 10**6)
        )
        text = sum(shard.size * (UNPACKED if Path(shard.name).suffix in COMPRESSIONS else 1) for shard in shards)
    except ConfigError as error:  # the data may be on another machine; training reports it
        return None, str(error)
    per_token = next(rate for least, rate in BYTES_PER_TOKEN if vocabulary >= least)
    if data.validation.kind == "held_out":
        text *= 1 - data.validation.fraction
    return text / per_token, f"{text / 1e6:,.1f} MB of files at about {per_token} bytes a token"
