"""The data of a configuration: a sample of each source is read, counted, and looked at for what goes wrong there."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from p828.config import Config, DataConfig
from p828.data.amount import Amount, amounts, describe, repeated
from p828.data.build import validation_batches
from p828.data.fractions import short
from p828.data.loader import open_prepared
from p828.data.order import source_seed
from p828.data.text.conversation_packing import template_of
from p828.data.text.open import open_training
from p828.data.tokenizer.chat_template import ChatTemplate
from p828.data.tokenizer.of_run import SAMPLED_CHARACTERS, lost_fraction
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.doctor.check import Check
from p828.errors import P828Error

MOST_DOCUMENTS = 2000
MOST_CHARACTERS = 2**24
MOST_SECONDS = 20.0  # of reading, after which what was read is enough: the hub may be slow
SAMPLES = 256  # of prepared data, from all over it
LEAST_TOKENS = 32  # of a piece of a document there: shorter ones may well be equal
# Beyond these, something is to be looked at. Text that is written once and kept once repeats less than 1 in 100
# documents word for word (arXiv 2107.06499 finds 3 in 100 near duplicates in C4); of a byte-level vocabulary all text
# comes back, so what does not is lost to the model.
MUCH_REPEATED = 0.01
MUCH_LOST = 0.001
MOSTLY_LOST = 0.1
DROP = "leave repeats out with p828 prepare CONFIG --prepare.drop-duplicates, and train on the prepared data"


@dataclass(frozen=True)
class DocumentSample:
    """Counts of some documents."""

    documents: int
    repeated: int
    """Those whose text had come before."""
    characters: int
    tokens: float | None = None
    """As many as all of them have, from the tokens of the first `SAMPLED_CHARACTERS`; None without a tokenizer."""
    lost: float | None = None
    """Share of the bytes that decoding the tokens does not give back; None where that was not looked at."""


def check_data(config: Config, tokenizer: Tokenizer | None) -> list[Check]:
    """Each source, how often the run goes through it, and the validation text; without a tokenizer the text alone."""
    sources = zip(config.data.source_names, config.data.sources, strict=True)
    checks = [
        _source(name, data, source_seed(config.train.seed, i), tokenizer) for i, (name, data) in enumerate(sources)
    ]
    if tokenizer is not None and all(check.status != "failure" for check in checks):
        checks += [_amount(config, tokenizer), _validation(config, tokenizer)]
    return checks


def sample_of(
    documents: Iterable[str], tokenizer: Tokenizer | None, template: ChatTemplate | None = None
) -> DocumentSample:
    """Count documents, up to a number of them, of characters and of seconds. Raises what reading them raises.

    With a `template` they are conversations as marked text, of which the messages are to come back from their tokens.
    """
    begun, seen, texts, count, characters = time.monotonic(), set[bytes](), list[str](), 0, 0
    for text in documents:
        if kept := text[: max(SAMPLED_CHARACTERS - characters, 0)]:
            texts.append(kept if template is None else text)
        count, characters = count + 1, characters + len(text)
        seen.add(hashlib.blake2b(text.encode(), digest_size=16).digest())
        is_late = time.monotonic() - begun > MOST_SECONDS
        if count == MOST_DOCUMENTS or characters >= MOST_CHARACTERS or is_late:
            break
    found = DocumentSample(count, count - len(seen), characters)
    if tokenizer is None or not texts:
        return found
    encoded = tokenizer.encode_documents(texts) if template is None else tokenizer.encode_marked(texts)
    tokens = sum(map(len, encoded)) * characters / sum(map(len, texts))
    plain = texts if template is None else map(template.control.plain, texts)
    return replace(found, tokens=tokens, lost=lost_fraction(tokenizer, plain))


def _source(name: str, data: DataConfig, seed: int, tokenizer: Tokenizer | None) -> Check:
    name = f"data {name}"
    try:
        if data.prepared and tokenizer is None:
            return Check(name, "warning", "prepared data: not looked at, for want of its tokenizer")
        if data.prepared and tokenizer is not None:
            found, what = sample_of(_prepared(data, tokenizer), tokenizer), "prepared documents and pieces of them"
        else:
            template = None if tokenizer is None else template_of(data, tokenizer)
            stream = open_training(replace(data, block_documents=1), seed, epochs=1, template=template)
            found, what = sample_of(stream, tokenizer, template), "documents"
    except P828Error as error:
        first, _, rest = str(error).partition("\n")
        return Check(name, "failure", first, rest or "mend or leave out what is named, or give other data")
    return _judged(name, found, what)


def _judged(name: str, found: DocumentSample, what: str) -> Check:
    parts = [f"a sample of {found.documents:,} {what}: {short(found.characters)} characters"]
    if found.tokens:
        parts[0] += f", about {short(found.tokens)} tokens ({found.characters / found.tokens:.2f} characters a token)"
    parts.append(f"{found.repeated:,} repeated")
    if found.lost is not None:
        parts.append(f"{'all' if not found.lost else f'{1 - found.lost:.3%}'} of the text survives decoding")
    text = "; ".join(parts)
    if (found.lost or 0.0) > MUCH_LOST:
        remedy = 'a tokenizer that knows this text: tokenizer.name = "train", or another'
        return Check(name, "failure" if (found.lost or 0.0) > MOSTLY_LOST else "warning", text, remedy)
    if found.repeated > MUCH_REPEATED * found.documents:
        return Check(name, "warning", text, DROP)
    return Check(name, "ok", text)


def _prepared(data: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of documents and pieces of documents, from all over the prepared data."""
    tokens = open_prepared(data, tokenizer).tokens("training")
    length = data.sequence_length + 1
    count = min(SAMPLES, max(len(tokens) // length, 1))
    for number in range(count):
        sample = tokens.sample(number * (len(tokens) // count), length, epoch=0)
        for document in range(int(sample.document_ids.max()) + 1):
            ids = sample.tokens[sample.document_ids == document]
            ids = ids[ids != tokenizer.eos_id]
            if len(ids) >= LEAST_TOKENS:
                yield tokenizer.decode(ids.tolist())


def _amount(config: Config, tokenizer: Tokenizer) -> Check:
    """How much text there is, and how often the run goes through it."""
    name = "epochs"
    try:
        found = amounts(config, tokenizer, ranks=1)
    except P828Error as error:
        return Check(name, "warning", str(error).partition("\n")[0])
    if lines := repeated(found):
        often = "; ".join(line.partition(". ")[0] for line in lines)
        return Check(name, "warning", often, lines[0].partition(". ")[2])
    return Check(name, "ok", "; ".join(f"{one.name}: {describe(one)}{_epochs(one)}" for one in found))


def _epochs(amount: Amount) -> str:
    return "" if amount.epochs is None else f", {amount.epochs:.2g} epochs in the run"


def _validation(config: Config, tokenizer: Tokenizer) -> Check:
    """Whether there is text to validate on."""
    name, rows = "validation", min(config.evaluation.rows, 8)
    try:
        batches = validation_batches(config.data, tokenizer, config.model.mask_documents, rows, rows)
    except P828Error as error:
        first, _, rest = str(error).partition("\n")
        return Check(name, "failure", first, rest or "give --data.validation.files, or a larger fraction")
    targets = sum(batch.num_targets for batch in batches)
    return Check(name, "ok", f"read: {targets:,} targets in the first {sum(len(b.tokens_BS) for b in batches)} rows")
