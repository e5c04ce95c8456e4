"""Which text a trained model is measured on: its run's own validation text, or another."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from p828.config import Config, DataConfig, validate
from p828.config.files import implied
from p828.config.given import check_given
from p828.config.values import changed, shown
from p828.data.batch import Batch
from p828.data.build import all_validation_batches, validation_batches
from p828.data.tokens.settings import with_prepared_sources
from p828.errors import ConfigError
from p828.inference.load import LoadedModel

OF_TEXT = ("data.source", "data.files", "data.hub_name", "data.prepared", "data.mixture", "data.validation.")
"""What names a text."""


def measured_config(loaded: LoadedModel, given: Mapping[str, Any]) -> Config:
    """The run's configuration with what is given: `rows`, `micro_batch_size`, and dotted keys of `data`.

    Given `data.files` are what is measured, held out or not. Raises ConfigError, also for an imported model without
    any text that is given.
    """
    data, run = _data_values(given), loaded.config
    if not loaded.has_text and not any(key.startswith(OF_TEXT) for key in given):
        raise ConfigError(f"{loaded.path}: a model that was imported has no text of its own: give --data.files FILE")
    of_the_data = [f"data.{key}" for key in data]
    prepared = with_prepared_sources(dataclasses.replace(run, data=_data(run.data, data)), of_the_data)
    config = dataclasses.replace(
        run,
        data=prepared.data,  # the tokenizer is the run's
        evaluation=dataclasses.replace(run.evaluation, rows=given.get("rows", run.evaluation.rows)),
        train=dataclasses.replace(
            run.train, micro_batch_size=given.get("micro_batch_size", run.train.micro_batch_size)
        ),
    )
    validate(config)
    check_given(config, of_the_data, run, in_files=())
    return config


def _data_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given for `data`, without that prefix; given files are what is measured, held out or not."""
    data = {key: value for key, value in given.items() if key.startswith("data.")}
    if "data.files" in data and not any(key.startswith("data.validation.") for key in data):
        files = data.pop("data.files")
        if data.pop("data.source", "files") != "files":
            raise ConfigError(f'data.files = {shown(list(files))}: accepted with data.source = "files"')
        data["data.validation.files"] = files
    data = {**implied(data), **data}
    return {key.removeprefix("data."): value for key, value in data.items()}


def _data(run: DataConfig, values: Mapping[str, Any]) -> DataConfig:
    """The run's data with what is given of it."""
    data: DataConfig = changed(run, values)
    if "files" in values and "validation.files" in values:
        raise ConfigError("data.files and data.validation.files are both given: either names the files to measure")
    validation = data.validation
    is_other = validation.kind == "files" or (validation.kind == "split" and validation.hub_name)
    if is_other and not {*values}.isdisjoint(("hub_name", "hub_subset", "hub_split")):
        raise ConfigError(
            f'data.hub_name and its like: with data.validation.kind = "{validation.kind}", other text is measured; '
            "give --data.validation.hub-name and --data.validation.split"
        )
    if "validation.files" in values and data.validation.kind == "files":
        # No other source is read, so it need not be complete.
        fields = {key: values.get(key, getattr(run.sources[0], key)) for key in ("text_field", "messages_field")}
        return dataclasses.replace(
            data, source=run.source, files=run.files, mixture=(), mixture_steps=(0,), prepared="", **fields
        )
    is_the_runs = all(getattr(data, key) == getattr(run, key) for key in ("validation", "source", "files", "hub_name"))
    if is_the_runs or "prepared" in values:
        return data
    # Prepared data has the run's own validation text: other text is read as text.
    mixture = tuple(dataclasses.replace(mixed, prepared="") for mixed in data.mixture)
    return dataclasses.replace(data, prepared="", mixture=mixture)


def _is_every_row(config: Config, given: Collection[str]) -> bool:
    """Whether files were given, and no number of rows of them."""
    are_given = "data.files" in given or "data.validation.files" in given
    return config.data.validation.kind == "files" and are_given and "rows" not in given


def batches_of(
    config: Config, loaded: LoadedModel, given: Collection[str], report: Callable[[str], None]
) -> Iterator[Batch]:
    """What to measure with `measured_config`. `report` is given a line when a failed read is repeated.

    Raises ConfigError if there is no text.
    """
    size, mask_documents = config.train.micro_batch_size, config.model.mask_documents
    with _named_as_given(given):
        if _is_every_row(config, given):
            yield from all_validation_batches(config.data, loaded.tokenizer, mask_documents, size, report)
            return
        rules = loaded.rules if _texts(config) == _texts(loaded.config) else []
        rows = config.evaluation.rows
        yield from validation_batches(config.data, loaded.tokenizer, mask_documents, rows, size, rules, report=report)


@contextmanager
def _named_as_given(given: Collection[str]) -> Iterator[None]:
    """Errors about files name `data.files` where that was given and became `data.validation.files`."""
    try:
        yield
    except ConfigError as error:
        if "data.files" not in given:
            raise
        raise ConfigError(str(error).replace("data.validation.files", "data.files")) from None


def _texts(config: Config) -> list[tuple[Any, ...]]:
    """What text the sources are."""
    return [
        (s.source, s.files, s.text_field, s.messages_field, s.hub_name, s.hub_subset, s.hub_split)
        for s in config.data.sources
    ]


def in_words(config: Config, given: Collection[str]) -> str:
    """What was measured, in words."""
    data, validation = config.data, config.data.validation
    rows = "all rows" if _is_every_row(config, given) else f"at most {config.evaluation.rows:,} rows"
    rows = f"{rows} of {data.sequence_length:,} tokens"
    if validation.kind == "files":
        return f"{rows} of {shown(list(validation.files))}"
    if validation.kind == "split":
        return f"{rows} of the split {validation.split!r} of {validation.hub_name or data.hub_name}"
    source = {"python": "the standard library's source", "files": shown(list(data.files)), "hf": data.hub_name}
    what = "the mixture's sources" if data.mixture else data.prepared or source[data.source]
    return f"{rows} of the {100 * validation.fraction:g}% of {what} that are held out from training"
