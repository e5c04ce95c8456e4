"""The settings of text and its tokens: the sections `data`, `prepare` and `tokenizer` of the configuration (`schema`).

Every field says whether it decides the tokens that `p828 prepare` writes.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro.conf

from p828.config.facts import changeable, fixed


@dataclass(frozen=True)
class ValidationConfig:
    kind: Literal["held_out", "split", "files"] = fixed("held_out", decides_tokens=True)
    """`held_out`: a fraction of the training text; `split`: a split on the hub; `files`: other files."""
    fraction: float = fixed(0.01, at_least=0, at_most=1, decides_tokens=True, implies="held_out", old_name="share")
    """Fraction held out: of the documents, by hash; of few local documents the end of each."""
    files: tuple[str, ...] = changeable((), decides_tokens=True, implies="files")
    """Validation files: paths, directories or globs, from the working directory; given, they imply the kind."""
    hub_name: str = fixed("", decides_tokens=True, implies="split")
    """Hub data set of the validation split; empty means the training one."""
    hub_revision: str = fixed("", decides_tokens=True, only_with=("split",))
    """Commit, tag or branch of that data set; empty means the newest, which is then recorded and kept."""
    split: str = fixed("validation", decides_tokens=True, implies="split")
    """Name of the validation split."""


@dataclass(frozen=True)
class SourceConfig:
    prepared: str = changeable("", decides_tokens=False)
    """Directory of tokens that `p828 prepare` writes and `p828 train` then reads in place of the source."""
    source: Literal["python", "files", "hf"] = fixed("python", decides_tokens=True)
    """`python`: this interpreter's standard library; `files`: local files; `hf`: a data set on the Hugging Face hub."""
    files: tuple[str, ...] = changeable((), decides_tokens=True, implies="files")
    """Paths, directories or globs of .txt, .py, .md, .jsonl (.gz, .xz, .zst), from the working directory."""
    text_field: str = fixed("text", decides_tokens=True, only_with=("files", "hf"))
    """Field that holds the text in .jsonl lines and in hub rows."""
    messages_field: str = fixed("", decides_tokens=False, only_with=("files", "hf"))
    """Field that holds messages: a line or row is then a conversation, of which the assistant's part is learned."""
    hub_name: str = fixed("", decides_tokens=True, implies="hf")
    """Hub data set (codeparrot/codeparrot-clean), or a local directory in the hub's layout."""
    hub_subset: str = fixed("", decides_tokens=True, only_with=("hf",))
    """Subset of the hub data set (`en` of allenai/c4)."""
    hub_revision: str = fixed("", decides_tokens=False, only_with=("hf",))
    """Commit, tag or branch of the hub data set; empty means the newest, which is then recorded and kept."""
    hub_split: str = fixed("train", decides_tokens=True, only_with=("hf",))
    """Split of the hub data set that is trained on."""


@dataclass(frozen=True)
class MixedSource(SourceConfig):
    name: str = fixed("", decides_tokens=False)
    """What records and console call the source."""
    weights: tuple[float, ...] = changeable((1.0,), decides_tokens=False)
    """Proportions of the tokens, relative to the other sources' weights: one for each of `data.mixture_steps`."""


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    mixture: Annotated[tuple[MixedSource, ...], tyro.conf.Suppress] = fixed((), decides_tokens=False)
    """Several sources in place of the one above, each a [[data.mixture]] with its keys, a name and weights."""
    mixture_steps: tuple[int, ...] = changeable((0,), decides_tokens=False, only_trains=True)
    """Steps after which the mixture's next weights hold; the first is 0."""
    sequence_length: int = fixed(2048, at_least=1, decides_tokens=True)
    """Tokens of a sequence that the model predicts; a sequence holds one more."""
    packing: Literal["concatenate", "best_fit"] = fixed("concatenate", decides_tokens=True, only_trains=True)
    """`concatenate`: documents end to end; `best_fit`: as many as possible whole, the others in pieces that fill."""
    streams: int = fixed(1, at_least=1, decides_tokens=False, only_trains=True)
    """Parts that a source read as text is dealt to; give a multiple of the ranks, and each reads parts of its own."""
    block_documents: int = fixed(1024, at_least=1, decides_tokens=False, only_trains=True)
    """Documents that are read and shuffled together."""
    shuffle_rows: int = fixed(1024, at_least=1, decides_tokens=False, only_trains=True)
    """Sequences that are shuffled together, so that a batch is not one long document; 1 keeps their order."""
    read_retries: int = changeable(6, at_least=0, decides_tokens=False)
    """Attempts to read on after a failed read of a file or the hub, 1, 2, 4, ... seconds apart."""
    bad_records: Literal["stop", "skip"] = changeable("stop", decides_tokens=False)
    """At a line, row or file that is no document: `stop`, with a checkpoint, or `skip` it and count it."""
    max_document_megabytes: int = fixed(16, at_least=1, decides_tokens=True)
    """Largest document: a longer line is a bad record; a larger text file is read in pieces, each a document."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def sources(self) -> tuple["DataConfig", ...]:
        """Every source of the mixture as if it were the only one; without a mixture, this one."""
        keys = [f.name for f in dataclasses.fields(SourceConfig)]
        return tuple(
            dataclasses.replace(self, mixture=(), mixture_steps=(0,), **{key: getattr(mixed, key) for key in keys})
            for mixed in self.mixture
        ) or (self,)

    @property
    def has_conversations(self) -> bool:
        """Whether a source is conversations."""
        return any(source.messages_field for source in self.sources)

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(mixed.name for mixed in self.mixture) or (self.source,)


@dataclass(frozen=True)
class PrepareConfig:
    min_characters: int = changeable(0, at_least=0, decides_tokens=True)
    """Shorter documents are left out."""
    max_characters: int = changeable(0, at_least=0, decides_tokens=True)
    """Longer documents are left out; 0 keeps any."""
    drop_duplicates: bool = changeable(False, decides_tokens=True)
    """Of documents with the same text keep the first."""
    only_code: bool = changeable(False, decides_tokens=True)
    """Keep documents with lines of at most 1,000 characters, 100 in the mean, a quarter of all letters or digits."""
    shard_tokens: int = changeable(100_000_000, at_least=1, decides_tokens=True)
    """Tokens after which a new shard begins."""


@dataclass(frozen=True)
class TokenizerConfig:
    name: str = fixed("train", decides_tokens=True)
    """`train` (byte-level BPE from the run's own source), the path of a tokenizer.json, or a name on the hub."""
    vocab_size: int = fixed(4096, at_least=1, decides_tokens=True)
    """Vocabulary of a trained tokenizer; of another one, what `--dry-run` assumes before the tokenizer is read."""
    training_megabytes: int = fixed(64, at_least=1, decides_tokens=True)
    """Text that a tokenizer is trained on, at most."""
    eos_token: str = fixed("<|endoftext|>", decides_tokens=True, is_prose=True)
    """Token that ends a document."""
    chat_template: str = fixed("", decides_tokens=False)
    """How conversations are written: `chatml`, `zephyr` or a template's path; empty: the tokenizer's own, or chatml."""
