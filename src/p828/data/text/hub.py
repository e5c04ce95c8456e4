"""Shards of a data set on the Hugging Face hub, or of a local directory in the hub's layout, streamed."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p828.config import Config
from p828.data.text.conversation import conversation_of
from p828.data.text.files import LARGEST_DOCUMENT, file_identity, text_of
from p828.data.text.shard import BadRecord
from p828.data.tokenizer.chat_template import ChatTemplate
from p828.data.tokenizer.tokenizer_config import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from p828.errors import ConfigError, DataError, TransientReadError, reason

CONNECT_SECONDS = 10.0
EMPTY_SHARD = "BatchSize must be greater than 0"  # what pyarrow says of a .parquet file without rows
LONGEST_CAUSE = 300  # characters of a library's message that are passed on


@dataclass(frozen=True)
class HubShard:
    """One shard of a streamed split: `dataset.shard(num_shards, index)`."""

    dataset: Any  # datasets.IterableDataset
    index: int
    num_shards: int
    name: str
    text_field: str
    limit: int = LARGEST_DOCUMENT
    """Bytes of a document; a larger one is a bad record."""
    skips: bool = False
    """Whether bad records are given in the place of texts, and not raised."""
    size: int = 0
    paths: tuple[Path, ...] = ()
    """Of a local directory, the shard's file, or all files of the split where a shard is none of them."""
    template: ChatTemplate | None = None
    """As of a `FileShard`."""

    def identity(self, with_contents: bool) -> str:
        """The name; of local files name, size and, if wanted, a checksum of the first and last bytes."""
        if not self.paths:
            return self.name
        try:
            files = [file_identity(path, with_contents) for path in self.paths]
            return " ".join([f"{self.index + 1} of {self.num_shards}", *files])
        except OSError as error:
            raise TransientReadError(f"{self.name}: cannot be read: {reason(error)}") from None

    def prefix(self, records: int) -> str:
        return ""

    def fraction_read(self) -> float:
        return 0.0

    def documents(self, start: int = 0) -> Iterator[str | BadRecord]:
        """Raises DataError naming the row whose text is missing or the shard that is malformed, and
        TransientReadError.
        """
        from datasets.exceptions import DatasetsError
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, as it uses

        rows = iter(self.dataset.shard(num_shards=self.num_shards, index=self.index).skip(start))
        number = start
        while True:
            try:
                row = next(rows, None)
            except (OSError, httpx.RequestError, ValueError, DatasetsError) as error:
                if EMPTY_SHARD in str(error):
                    return
                may_pass = isinstance(error, OSError | httpx.RequestError) and not isinstance(error, FileNotFoundError)
                kind = TransientReadError if may_pass else DataError
                raise kind(f"{self.name}, after row {number}: cannot be read: {_in_short(error)}") from error
            if row is None:
                return
            number += 1
            try:
                text: str | BadRecord = self._text(row, number)
            except BadRecord as bad:
                if not self.skips:
                    raise
                text = bad
            yield text

    def _text(self, row: object, number: int) -> str:
        where = f"{self.name}, row {number}"
        if self.template is None:
            text = text_of(row, self.text_field, where, number - 1)
        else:
            text = conversation_of(row, self.text_field, self.template, where, number - 1)
        if len(text) > self.limit // 4 and len(text.encode()) > self.limit:
            most = self.limit / 10**6
            raise BadRecord(f"{where}: more than data.max_document_megabytes = {most:g} is not accepted", number - 1)
        return text


def hub_shards(
    name: str,
    subset: str,
    split: str,
    text_field: str,
    revision: str = "",
    limit: int = LARGEST_DOCUMENT,
    skips: bool = False,
    template: ChatTemplate | None = None,
) -> list[HubShard]:
    """The shards of one split, at a revision of the hub's data set, or the newest; conversations with a `template`.

    Raises ConfigError in two lines: what failed, and what to do.
    """
    if not os.path.isdir(name):
        check_reachable(name, "dataset", revision)
    elif revision:
        raise ConfigError(
            f"data.hub_revision = {revision[:80]!r}: {name} is a local directory, which has no revisions\n"
            "Leave it empty"
        )

    import datasets
    from datasets.exceptions import DatasetsError

    # It logs what it then raises, also of files without rows, which are passed over here.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    place = f"{name}/{subset}" if subset else name
    place += f" at {revision}" if revision else ""
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split, streaming=True, revision=revision or None)
    except (OSError, ValueError, LookupError, DatasetsError) as error:  # LookupError: the name has no last part, as /
        advice = "Check the name, the subset (data.hub_subset) and the split (data.hub_split, data.validation.split)"
        if isinstance(error, ConnectionError):
            advice = without_network("dataset")
        raise ConfigError(f"data set {place}, split {split!r}: {_in_short(error)}\n{advice}") from error
    count = dataset.num_shards
    paths = _paths(name, subset, split) if os.path.isdir(name) else []
    shards = []
    for i in range(count):
        own = tuple(paths[i : i + 1] if len(paths) == count else paths)
        shown = f"{place} split {split} shard {i + 1} of {count}"
        shards.append(HubShard(dataset, i, count, shown, text_field, limit, skips, paths=own, template=template))
    return shards


def _paths(directory: str, subset: str, split: str) -> list[Path]:
    """The files of a split of a local directory, in their order. It has been loaded before."""
    import datasets

    files = datasets.load_dataset_builder(directory, subset or None).config.data_files or {}
    return [Path(file) for file in files.get(split, ()) if os.path.isfile(file)]


def pinned(config: Config, before: Config | None) -> tuple[Config, list[str]]:
    """The configuration with every hub data set at one commit, and a line for each that has a newer commit on the hub.

    A run goes on with the commits in its own configuration, `before`, and without one where that has none. Without the
    network nothing is pinned, nor is what prepared data was made from, which is not read. Raises ConfigError as
    `hub_shards`.
    """
    lines: list[str] = []
    data = config.data
    earlier = {source.hub_name: source.hub_revision for source in before.data.sources} if before else {}

    def commit(name: str, key: str, of_run: str | None, is_read: bool) -> str:
        if not is_read:
            return of_run or ""
        newest = check_reachable(name, "dataset")
        if of_run and newest and newest != of_run:
            lines.append(f"{name}: the hub has a newer commit, {newest}; the run goes on with its {key} = {of_run}")
        return newest if of_run is None else of_run

    def is_free(name: str, revision: str) -> bool:
        return bool(name) and not revision and not os.path.isdir(name)

    if data.source == "hf" and not data.mixture and is_free(data.hub_name, data.hub_revision):
        revision = commit(data.hub_name, "data.hub_revision", earlier.get(data.hub_name), not data.prepared)
        data = replace(data, hub_revision=revision)
    mixture = tuple(
        replace(
            mixed,
            hub_revision=commit(mixed.hub_name, "hub_revision", earlier.get(mixed.hub_name), not mixed.prepared),
        )
        if mixed.source == "hf" and is_free(mixed.hub_name, mixed.hub_revision)
        else mixed
        for mixed in data.mixture
    )
    validation = data.validation
    if validation.kind == "split" and is_free(validation.hub_name, validation.hub_revision):
        of_run = before.data.validation.hub_revision if before else None
        is_read = not all(source.prepared for source in config.data.sources)
        revision = commit(validation.hub_name, "data.validation.hub_revision", of_run, is_read)
        validation = replace(validation, hub_revision=revision)
    return replace(config, data=replace(data, mixture=mixture, validation=validation)), lines


def download_tokenizer(name: str, with_template: bool = False) -> Path:
    """The cached tokenizer.json of a model on the hub, downloaded if need be; `with_template` also what lies beside it.

    Raises ConfigError as `hub_shards`.
    """
    path = _download_tokenizer(name)
    if with_template:
        _download_template(name, path.parent)
    return path


def _download_template(name: str, snapshot: Path) -> None:
    """What says the chat template of a tokenizer, if the hub has it, into the snapshot that has the tokenizer.

    Raises ConfigError if that is not known without the network.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in (TOKENIZER_CONFIG_FILE, TEMPLATE_FILE):
        if huggingface_hub.try_to_load_from_cache(name, file, revision=snapshot.name) is not None:
            continue  # it is there, or known not to be
        try:
            huggingface_hub.hf_hub_download(name, file, revision=snapshot.name)
        except LocalEntryNotFoundError as error:
            if file == TEMPLATE_FILE and (snapshot / TOKENIZER_CONFIG_FILE).exists():
                continue  # most repositories have the one file alone
            raise ConfigError(
                f"{file} of {name}: {_in_short(error)}\n"
                "Without the hub: HF_HUB_OFFLINE=1 with a filled cache, or tokenizer.chat_template"
            ) from error
        except EntryNotFoundError:
            continue


def _download_tokenizer(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except LocalEntryNotFoundError:
        check_reachable(name, "model")
    except HFValidationError as error:
        raise ConfigError(f"tokenizer.name = {name!r}: {_in_short(error)}\n{without_network('model')}") from error
    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except (OSError, EntryNotFoundError) as error:
        raise ConfigError(f"tokenizer of {name}: {_in_short(error)}\n{without_network('model')}") from error


def check_reachable(name: str, kind: str, revision: str = "") -> str:
    """Ask the hub for the repository once, and return its commit.

    Raises ConfigError in seconds where a download would retry for half a minute. In offline mode a data set may still
    come from the cache, and is left to `datasets`; its commit is not known then, and empty.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        if kind == "dataset":
            return ""
        raise ConfigError(f"{kind} {name}: not in the cache, and HF_HUB_OFFLINE is set\n{without_network(kind)}")
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision or None, timeout=CONNECT_SECONDS)
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{kind} {name}: the hub has no revision {revision[:80]!r} of it\nCheck data.hub_revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{kind} {name}: the hub has none of this name that this account may read\n"
            "Check the name; for a private or gated one log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"{kind} {name}: {_in_short(error)}\n{without_network(kind)}") from error
    except Exception as error:
        # Which classes stand for a dead network depends on the HTTP library that huggingface_hub uses.
        raise ConfigError(
            f"{kind} {name}: the Hugging Face hub cannot be reached: {_in_short(error)}\n{without_network(kind)}"
        ) from error
    return info.sha or ""


def without_network(kind: str) -> str:
    if kind == "model":
        return (
            "Without the hub: HF_HUB_OFFLINE=1 with a filled cache, the path of a tokenizer.json as tokenizer.name, "
            'or tokenizer.name = "train"'
        )
    return (
        "Without the hub: HF_HUB_OFFLINE=1 with a filled cache, a local directory in the hub's layout as the name, "
        'or data.source = "files"'
    )


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " …"
