"""By which rule text is held out of training: whole documents, or the end of each one where there are few.

`documents.divided` applies the rule to a document.
"""

import math
import os
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import islice

from p828.config import DataConfig
from p828.data.retry import Retry
from p828.data.text.documents import is_held_out, read_documents
from p828.data.text.files import FileShard, file_shards
from p828.data.text.hub import HubShard
from p828.data.text.shard import BadRecord, Shard

EXPECTED_DOCUMENTS = 10  # held out whole, and trained on, at least; else the end of each is held out
SEARCHED = 3  # times as many documents are searched for one to hold out: of different ones, exp(-30) have none
LEAST_SEARCHED = 1000  # documents, however large the fraction
MOST_DOCUMENTS = 2**53  # that are counted with; a fraction can be so small that it would be infinitely many


def enough_documents(fraction: float) -> int:
    """The fewest documents of which the fraction can be held out as whole documents, with enough left to train on."""
    return math.ceil(min(EXPECTED_DOCUMENTS / min(fraction, 1 - fraction), MOST_DOCUMENTS))


def are_few(shards: Sequence[Shard], fraction: float, retry: Retry) -> bool:
    """Whether there are fewer than `enough_documents`, or the hash puts the first documents all on one side.

    The second happens where the same document comes again and again. The hash is tried on three times as many
    documents as are enough, and no more are read.
    """
    enough = enough_documents(fraction)
    searched = max(SEARCHED * enough, LEAST_SEARCHED)
    return _are_fewer(shards, enough, retry) or not _are_parted(shards, fraction, searched, retry)


def _are_parted(shards: Sequence[Shard], fraction: float, most: int, retry: Retry) -> bool:
    """Whether some of the first `most` documents are held out whole, and others are not."""
    found: set[bool] = set()
    texts = (text for shard in shards for text in _documents(shard, retry))
    for text in islice((text for text in texts if isinstance(text, str) and text.strip()), most):
        found.add(is_held_out(text, fraction))
        if len(found) == 2:
            return True
    return False


def _are_fewer(shards: Sequence[Shard], enough: int, retry: Retry) -> bool:
    """Whether there are fewer documents than that. No more than those are read, and of text files none."""
    count = 0
    for shard in shards:
        if isinstance(shard, FileShard) and not shard.has_lines:
            count += shard.size > 0
        else:
            for text in _documents(shard, retry):
                count += not isinstance(text, str) or bool(text.strip())
                if count >= enough:
                    break
        if count >= enough:
            return False
    return True


def _documents(shard: Shard, retry: Retry) -> Iterator[str | BadRecord]:
    """A shard's documents and bad records; up to the first bad one of a kind of shard that cannot skip it."""
    # Another object, since a shard keeps how much of it was read.
    shard = replace(shard, skips=True) if isinstance(shard, FileShard | HubShard) else copy(shard)
    try:
        yield from read_documents(shard, 0, retry)
    except BadRecord as bad:  # training reports it when it gets there
        yield bad


def trained_on_too(config: DataConfig) -> list[str]:
    """A line if validation files are among the training files. Raises ConfigError as `file_shards`."""
    if config.source != "files" or config.validation.kind != "files":
        return []
    training = {os.path.realpath(shard.name) for shard in file_shards(config.files, config.text_field, "data.files")}
    validation = file_shards(config.validation.files, config.text_field, "data.validation.files")
    both = [shard.name for shard in validation if os.path.realpath(shard.name) in training]
    if not both:
        return []
    return [
        f"data.validation.files: {len(both):,} of {len(validation):,} files are in data.files too, as {both[0]}: "
        "they are trained on, so the validation loss does not tell how the model does on other text"
    ]


def unused_text_field(config: DataConfig) -> list[str]:
    """A line if `data.text_field` is not the default and no file has fields. Raises ConfigError as `file_shards`."""
    if config.source != "files" or config.text_field == DataConfig.text_field or config.validation.kind == "split":
        return []
    shards = file_shards(config.files, config.text_field, "data.files")
    if config.validation.kind == "files":
        shards += file_shards(config.validation.files, config.text_field, "data.validation.files")
    if not shards or any(shard.has_lines for shard in shards):
        return []
    return [
        f"data.text_field = {config.text_field[:80]!r}: it changes nothing, as there is no .jsonl file, which has "
        f"fields; {shards[0].name} is text as a whole"
    ]
