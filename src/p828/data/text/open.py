"""The documents that a configuration names: to train on, to validate on, or all of them in order.

Another kind of text is a `Shard` in a file of its own. A kind of local file is chosen in `_file_shards`, by its ending;
another source is a value of `data.source`, and a branch in `_training_shards` and `source_name`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from p828.config import DataConfig
from p828.data.retry import NO_RETRY, Retry
from p828.data.text.documents import DocumentStream, permutation
from p828.data.text.files import FileShard, file_shards, python_shards
from p828.data.text.held_out import are_few, enough_documents
from p828.data.text.hub import HubShard, hub_shards
from p828.data.text.shard import Shard, deal
from p828.data.tokenizer.chat_template import ChatTemplate, built_in

HELD_OUT_ORDER = (0,)  # held-out documents come in one shard order, whatever the run's seed


def open_training(
    config: DataConfig,
    seed: int,
    epochs: int | None = None,
    part: int = 0,
    parts: int = 1,
    retry: Retry = NO_RETRY,
    by_end: bool | None = None,
    template: ChatTemplate | None = None,
) -> DocumentStream:
    """The training documents, shuffled; without the held-out fraction if validation takes one.

    Of `parts` streams, which have no document in common, it is the one numbered `part`. `by_end` is the rule by which
    text is held out, if that is known already. Conversations are marked text of `template`; without one, where it does
    not matter, of a template that stands in for it. Raises ConfigError if the source cannot be opened; `epochs=None`
    never ends.
    """
    shards, source = _training_shards(config, retry.report, template), source_name(config)
    fraction = config.validation.fraction if config.validation.kind == "held_out" else 0.0
    if by_end is None:
        by_end = _is_held_out_by_end(config, shards, retry)
    shards = deal(shards, part, parts)
    if parts > 1:
        source = f"part {part + 1} of data.streams = {parts} of {source}"
    return DocumentStream(shards, source, config.block_documents, seed, epochs, fraction, by_end=by_end, retry=retry)


def open_in_order(config: DataConfig, retry: Retry = NO_RETRY, template: ChatTemplate | None = None) -> DocumentStream:
    """Every document of the source once, whole, in its own order. Raises ConfigError as `open_training`.

    Its `by_end` says by which rule the caller is to hold out text.
    """
    shards = _training_shards(config, retry.report, template)
    by_end = _is_held_out_by_end(config, shards, retry)
    return DocumentStream(shards, source_name(config), block_documents=1, epochs=1, by_end=by_end, retry=retry)


def open_validation(
    config: DataConfig, retry: Retry = NO_RETRY, by_end: bool | None = None, template: ChatTemplate | None = None
) -> DocumentStream:
    """The validation documents, once, in an order that no seed changes. Raises ConfigError as `open_training`."""
    validation = config.validation
    # Blocks of one document: evaluation reads no further than it needs.
    if validation.kind == "files":
        files = _file_shards(config, validation.files, "data.validation.files", retry.report, template)
        source = f"data.validation.files = {_shown(validation.files)}"
        return DocumentStream(files, source, block_documents=1, epochs=1, retry=retry)
    if validation.kind == "split":
        name = validation.hub_name or config.hub_name
        subset = config.hub_subset if name == config.hub_name else ""
        revision = validation.hub_revision or (config.hub_revision if name == config.hub_name else "")
        shards = _hub_shards(config, name, subset, validation.split, revision, template)
        return DocumentStream(shards, f"split {validation.split!r} of {name}", block_documents=1, epochs=1, retry=retry)
    in_order = _training_shards(config, retry.report, template)
    if by_end is None:
        by_end = _is_held_out_by_end(config, in_order, retry)
    # Spread over the source: evaluation may read the first documents only.
    spread = [in_order[i] for i in permutation(len(in_order), HELD_OUT_ORDER)]
    source = f"the held-out part (data.validation.fraction = {validation.fraction}) of {source_name(config)}"
    return DocumentStream(
        spread,
        source,
        block_documents=1,
        epochs=1,
        fraction=validation.fraction,
        held_out=True,
        by_end=by_end,
        retry=retry,
    )


def check_streams(
    config: DataConfig, seed: int, retry: Retry, by_end: bool, template: ChatTemplate | None = None
) -> None:
    """Raises ConfigError if one of several streams has no document, which would end the run at its first batch.

    What has to come over the network is not asked for.
    """
    if config.streams > 1 and _is_local(config):
        one_by_one = replace(config, block_documents=1)
        for part in range(config.streams):
            parts = config.streams
            next(open_training(one_by_one, seed, None, part, parts, retry, by_end, template))


def held_out_words(config: DataConfig, by_end: bool | None = None) -> str:
    """What is never trained on, in a line; empty where validation has text of its own.

    Raises ConfigError as `open_training`.
    """
    if config.validation.kind != "held_out":
        return ""
    source = " ".join(config.files) if config.source == "files" and len(config.files) <= 3 else source_name(config)
    if by_end is None:
        by_end = _may_be_few(config) and _is_held_out_by_end(config, _training_shards(config), NO_RETRY)
    fraction = f"{100 * config.validation.fraction:.3g}%"
    if not by_end:
        return f"held out for validation: {fraction} of the documents in {source}"
    enough = f"{enough_documents(config.validation.fraction):,} different ones"
    whole = f"whole documents are held out where there are at least {enough}"
    return f"held out for validation: the last {fraction} of each document in {source}; {whole}"


def _training_shards(
    config: DataConfig, report: Callable[[str], None] = lambda text: None, template: ChatTemplate | None = None
) -> Sequence[Shard]:
    if config.source == "python":
        return python_shards()
    if config.source == "files":
        return _file_shards(config, config.files, "data.files", report, template)
    return _hub_shards(config, config.hub_name, config.hub_subset, config.hub_split, config.hub_revision, template)


def source_name(config: DataConfig) -> str:
    """Where the training documents come from, in words."""
    if config.source == "python":
        return "the standard library's source"
    if config.source == "files":
        return f"data.files = {_shown(config.files)}"
    return f"split {config.hub_split!r} of {config.hub_name}"


def _file_shards(
    config: DataConfig, globs: tuple[str, ...], key: str, report: Callable[[str], None], template: ChatTemplate | None
) -> list[FileShard]:
    limit, (field, used) = config.max_document_megabytes * 10**6, _field(config, template)
    return file_shards(globs, field, key, limit, config.bad_records == "skip", report, used)


def _hub_shards(
    config: DataConfig, name: str, subset: str, split: str, revision: str, template: ChatTemplate | None
) -> list[HubShard]:
    limit, (field, used) = config.max_document_megabytes * 10**6, _field(config, template)
    return hub_shards(name, subset, split, field, revision, limit, config.bad_records == "skip", used)


def _field(config: DataConfig, template: ChatTemplate | None) -> tuple[str, ChatTemplate | None]:
    """The field that documents are in, and the template of conversations; None of text."""
    if not config.messages_field:
        return config.text_field, None
    return config.messages_field, template or built_in("zephyr", eos_token="", special_tokens=())


def _is_held_out_by_end(config: DataConfig, shards: Sequence[Shard], retry: Retry) -> bool:
    """Whether there are too few documents to hold out whole ones."""
    return _may_be_few(config) and are_few(shards, config.validation.fraction, retry)


def _may_be_few(config: DataConfig) -> bool:
    """Whether it is worth counting.

    The standard library has enough, the network is not asked, and of a conversation no end can be held out.
    """
    may_be_cut = config.source != "python" and not config.messages_field
    return config.validation.kind == "held_out" and may_be_cut and _is_local(config)


def _is_local(config: DataConfig) -> bool:
    return config.source != "hf" or os.path.isdir(config.hub_name)


def _shown(globs: Sequence[str]) -> str:
    text = str(list(globs))
    return text if len(text) <= 200 else text[:200] + "…"
