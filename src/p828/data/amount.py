"""How much there is to train on, and how often a run goes through it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from p828.config import Config, DataConfig
from p828.data.fractions import MANY_EPOCHS, planned_fractions, short
from p828.data.order import source_seed
from p828.data.text.conversation_packing import template_of
from p828.data.text.open import open_training
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.format import open_manifest
from p828.errors import ConfigError, DataError, TransientReadError

SAMPLE_DOCUMENTS = 256  # of those that the loader reads first
SAMPLE_CHARACTERS = 1000  # of each that are tokenized


@dataclass(frozen=True)
class Amount:
    """Training tokens of one source."""

    name: str
    """The source's name, as in records."""
    tokens: int | None
    """Of one epoch; None where the number is not known."""
    is_exact: bool
    """Counted when the data was prepared; else estimated from the first documents and the files' sizes."""
    planned: float
    """Tokens that the whole run takes from it."""
    problem: str = ""
    """Why it is not known."""

    @property
    def epochs(self) -> float | None:
        """How often the whole run goes through it."""
        return self.planned / self.tokens if self.tokens else None


def amounts(config: Config, tokenizer: Tokenizer, ranks: int) -> list[Amount]:
    """The amount of every source. Text is read no further than the loader reads it for its first batch."""
    found = []
    names, fractions = config.data.source_names, planned_fractions(config)
    for number, (name, data, fraction) in enumerate(zip(names, config.data.sources, fractions, strict=True)):
        planned = fraction * config.train.steps * config.tokens_per_step * ranks
        if data.prepared:
            tokens = sum(shard.tokens for shard in open_manifest(Path(data.prepared)).training)
            found.append(Amount(name, tokens, True, planned))
            continue
        try:
            estimate, problem = _estimated(data, source_seed(config.train.seed, number), tokenizer), ""
        except (ConfigError, DataError, TransientReadError) as error:  # training reports it when it gets there
            estimate, problem = None, str(error)
        found.append(Amount(name, estimate, False, planned, problem))
    return found


def _estimated(data: DataConfig, seed: int, tokenizer: Tokenizer) -> int | None:
    """Tokens of an epoch: those of the first documents by the fraction of the files' bytes that these are."""
    if data.source == "hf":  # which has no sizes
        return None
    one_by_one, template = replace(data, block_documents=1), template_of(data, tokenizer)
    stream = open_training(one_by_one, seed, epochs=1, template=template)  # which reads no further than it gives
    tokens, documents = 0.0, 0
    for text in stream:
        if data.messages_field:
            tokens += len(tokenizer.encode_marked([text])[0])
        else:
            beginning = text[:SAMPLE_CHARACTERS]
            tokens += len(tokenizer.encode(beginning)) * len(text) / len(beginning) + 1  # and EOS
        documents += 1
        if documents == SAMPLE_DOCUMENTS:
            break
    fraction = stream.fraction_read() if documents == SAMPLE_DOCUMENTS else 1.0
    return round(tokens / fraction) if fraction else None


def describe(amount: Amount) -> str:
    """`1.2 M tokens`, `about 1.2 M tokens` or `unknown`."""
    if amount.tokens is None:
        return f"tokens unknown: {amount.problem}" if amount.problem else "tokens unknown"
    return ("" if amount.is_exact else "about ") + f"{short(amount.tokens)} tokens"


def repeated(found: Sequence[Amount]) -> list[str]:
    """A line for each source that the run goes through too often."""
    return [
        f"{amount.name}: the run goes {amount.epochs:.1f} times through its {short(amount.tokens)} tokens. Above "
        f"{MANY_EPOCHS} epochs repeated text teaches less and less: give more text, or train fewer steps"
        for amount in found
        if amount.tokens and amount.epochs is not None and amount.epochs > MANY_EPOCHS
    ]
