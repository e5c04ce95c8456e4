"""The settings that decide the tokens of prepared data: compared, and taken over by a run that reads the data."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from p828.config import Config, DataConfig, SourceConfig, TokenizerConfig, ValidationConfig
from p828.config.facts import deciding_tokens
from p828.config.old_names import renamed
from p828.config.values import build, shown
from p828.data.retry import NO_RETRY, Retry
from p828.data.text.open import open_in_order, open_validation
from p828.data.text.shard import Shard
from p828.data.tokens.format import MANIFEST_FILE, Manifest, open_manifest
from p828.errors import ConfigError, DataError, TransientReadError

OF_A_TOKENIZER = ("name", "vocab_size", "eos_token")  # keys of the section tokenizer that say which one it is
NAMES_TEXT = {"files", "hub_name"}  # by which `source` is implied
LONGEST_DOCUMENT = "max_document_megabytes"  # decides them, too: what is longer is divided, or no document
LONGEST_VALUE = 200  # characters of a setting in a message

S = TypeVar("S", bound=SourceConfig)


def settings(config: Config, data: DataConfig | None = None) -> dict[str, Any]:
    """What decides the tokens of prepared data, their order and their division into files."""
    data = config.data if data is None else data
    return {
        "data": {**data_settings(data), LONGEST_DOCUMENT: getattr(data, LONGEST_DOCUMENT)},
        "tokenizer": deciding_tokens(config.tokenizer),
        "prepare": deciding_tokens(config.prepare),
    }


def data_settings(data: DataConfig) -> dict[str, Any]:
    """The part of `settings` that training has to have as well."""
    values = deciding_tokens(data)
    del values[LONGEST_DOCUMENT]  # of text; training reads the tokens
    length = values.pop("sequence_length")
    if data.packing == "best_fit":
        values["sequence_length"] = length  # after `packing`, which the message names where both differ
    if not data.validation.hub_revision:
        del values["validation"]["hub_revision"]  # which data prepared by an earlier version does not know
    return values


def check_settings(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raises ConfigError with the first setting that is another. Two spellings of a path are the same.

    `before` may have old names.
    """
    before = renamed(Config, before, str(path))[0]
    for section, values in now.items():
        for key, value in values.items():
            made = before[section].get(key)
            if (section, key) == ("tokenizer", "vocab_size") and values["name"] != "train":
                continue  # of a trained one
            if key == LONGEST_DOCUMENT and key not in before[section]:
                continue  # prepared by a version that did not keep it
            if made != value and _resolved(key, made) != _resolved(key, value):
                old, new = shown(made, LONGEST_VALUE), shown(value, LONGEST_VALUE)
                raise ConfigError(
                    f"{path}: made with {section}.{key} = {old}, not {new}. Give the configuration and flags that it "
                    "was prepared with, or another directory as data.prepared"
                )


def _resolved(key: str, value: Any) -> Any:
    """A setting with its paths, if it has any, absolute and without links."""
    if key == "files" and isinstance(value, list):
        return [os.path.realpath(os.path.expanduser(str(file))) for file in value]
    if key == "hub_name" and isinstance(value, str) and os.path.isdir(value):
        return os.path.realpath(value)
    if key == "validation" and isinstance(value, dict):
        return {name: _resolved(name, inner) for name, inner in value.items()}
    return value


def shards_of(data: DataConfig, retry: Retry = NO_RETRY) -> list[Shard]:
    """The shards of the source, and of what is validated on if that is text of its own. Raises ConfigError."""
    streams = [open_in_order(data, retry)]
    if data.validation.kind != "held_out":
        streams.append(open_validation(data, retry))
    return [shard for stream in streams for shard in stream.shards]


def with_paths_of(manifest: Manifest, data: DataConfig, retry: Retry = NO_RETRY) -> DataConfig:
    """The data with the paths that it was prepared from, if its own paths name the same text, which was moved."""
    made = _made(manifest)
    is_local = data.source == "files" or (data.source == "hf" and os.path.isdir(data.hub_name))
    is_same = all(_resolved(key, value) == _resolved(key, made.get(key)) for key, value in data_settings(data).items())
    if is_same or not is_local or manifest.files is None or not manifest.files.contents:
        return data
    try:
        changes = manifest.files.changes(shards_of(data, retry))
    except (ConfigError, DataError, TransientReadError):
        return data
    if changes:
        return data
    before = build(SourceConfig, {key: made[key] for key in NAMES_TEXT}, MANIFEST_FILE)
    validation = build(ValidationConfig, made["validation"], MANIFEST_FILE)
    validation = replace(data.validation, files=validation.files, hub_name=validation.hub_name)
    return replace(data, files=before.files, hub_name=before.hub_name, validation=validation)


def with_prepared_sources(config: Config, given: Collection[str]) -> Config:
    """The configuration with what its prepared data was made from, but for the keys that the user has given.

    `given` are dotted keys. Data that is not completely prepared changes nothing. Raises ConfigError for a manifest
    that cannot be read.
    """
    data = config.data
    manifests = [_manifest(source.prepared) for source in data.sources]
    if not any(manifests):
        return config
    if data.mixture:
        tables = [f"data.mixture[{number}]." for number in range(len(manifests))]
        mixture = [
            mixed if manifest is None else _with_source_of(manifest, mixed, given, table)
            for mixed, manifest, table in zip(data.mixture, manifests, tables, strict=True)
        ]
        data = replace(data, mixture=tuple(mixture))
    elif manifests[0] is not None:
        data = _with_source_of(manifests[0], data, given, "data.")
    first = next(manifest for manifest in manifests if manifest is not None)
    data = _with_division_of(first, data, given)
    tokenizer = _with_tokenizer_of(first, config.tokenizer, given)
    if not data.mixture and manifests[0] is not None:
        data = with_paths_of(manifests[0], data)
    return replace(config, data=data, tokenizer=tokenizer)


def _made(manifest: Manifest) -> dict[str, Any]:
    """The section data of the configuration that it was prepared with, under today's names."""
    made: dict[str, Any] = renamed(Config, manifest.settings, MANIFEST_FILE)[0]["data"]
    return made


def _manifest(directory: str) -> Manifest | None:
    try:
        if not directory or not (Path(directory) / MANIFEST_FILE).exists():
            return None
    except (OSError, ValueError):  # a name that no directory can have, which is refused elsewhere
        return None
    return open_manifest(Path(directory))


def _with_source_of(manifest: Manifest, source: S, given: Collection[str], table: str) -> S:
    """The source with the manifest's values of the keys of its table that are not given."""
    made = _made(manifest)
    of_a_source = deciding_tokens(SourceConfig()).keys()
    own = {key for key in of_a_source if table + key in given}
    if own & NAMES_TEXT:
        own.add("source")
    values = {key: made[key] for key in of_a_source if key not in own}
    before = build(SourceConfig, values, MANIFEST_FILE)
    return replace(source, **{key: getattr(before, key) for key in values})


def _with_tokenizer_of(manifest: Manifest, tokenizer: TokenizerConfig, given: Collection[str]) -> TokenizerConfig:
    """The tokenizer's settings with the manifest's values of the keys that name one and are not given."""
    made = renamed(Config, manifest.settings, MANIFEST_FILE)[0]["tokenizer"]
    values = {key: made[key] for key in OF_A_TOKENIZER if f"tokenizer.{key}" not in given}
    before = build(TokenizerConfig, values, MANIFEST_FILE)
    return replace(tokenizer, **{key: getattr(before, key) for key in values})


def _with_division_of(manifest: Manifest, data: DataConfig, given: Collection[str]) -> DataConfig:
    """The data with the manifest's packing and validation, but for the keys that are given."""
    made = _made(manifest)
    own = {key.removeprefix("data.validation.") for key in given if key.startswith("data.validation.")}
    if own:
        own.add("kind")  # which the others imply
    values = {key: value for key, value in made["validation"].items() if key not in own}
    before = build(ValidationConfig, values, MANIFEST_FILE)
    validation = replace(data.validation, **{key: getattr(before, key) for key in values})
    packing = data.packing if "data.packing" in given else made["packing"]
    return replace(data, packing=packing, validation=validation)
