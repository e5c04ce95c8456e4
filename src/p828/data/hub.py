"""Shards of a data set on the Hugging Face hub, or of a local directory in the hub's layout, streamed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p828.data.files import text_of
from p828.errors import ReadFailed, UserError

CONNECT_SECONDS = 10.0
LONGEST_CAUSE = 300  # characters of a library's message that are passed on


@dataclass(frozen=True)
class HubShard:
    """One shard of a streamed split: `dataset.shard(num_shards, index)`."""

    dataset: Any  # datasets.IterableDataset
    index: int
    num_shards: int
    name: str
    text_field: str
    size: int = 0

    def share_read(self) -> float:
        return 0.0

    def documents(self, start: int = 0) -> Iterator[str]:
        """Raises UserError naming the row whose text is missing or the shard that is malformed, and ReadFailed."""
        from datasets.exceptions import DatasetsError
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, as it uses

        rows = iter(self.dataset.shard(num_shards=self.num_shards, index=self.index).skip(start))
        number = start
        while True:
            try:
                row = next(rows, None)
            except (OSError, httpx.RequestError, ValueError, DatasetsError) as error:
                may_pass = isinstance(error, OSError | httpx.RequestError) and not isinstance(error, FileNotFoundError)
                kind = ReadFailed if may_pass else UserError
                raise kind(f"{self.name}, after row {number}: cannot be read: {_in_short(error)}") from error
            if row is None:
                return
            number += 1
            yield text_of(row, self.text_field, f"{self.name}, row {number}")


def hub_shards(name: str, subset: str, split: str, text_field: str) -> list[HubShard]:
    """The shards of one split. Raises UserError in two lines: what failed, and what to do."""
    if not os.path.isdir(name):
        check_reachable(name, "dataset")

    import datasets
    from datasets.exceptions import DatasetsError

    place = f"{name}/{subset}" if subset else name
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        advice = "Check the name, the subset (data.hub_subset) and the split (data.hub_split, data.validation.split)"
        if isinstance(error, ConnectionError):
            advice = without_network("dataset")
        raise UserError(f"data set {place}, split {split!r}: {_in_short(error)}\n{advice}") from error
    count = dataset.num_shards
    return [
        HubShard(dataset, i, count, f"{place} split {split} shard {i + 1} of {count}", text_field) for i in range(count)
    ]


def download_tokenizer(name: str) -> Path:
    """The cached tokenizer.json of a model on the hub, downloaded if need be. Raises UserError as `hub_shards`."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except LocalEntryNotFoundError:
        check_reachable(name, "model")
    except HFValidationError as error:
        raise UserError(f"tokenizer.name = {name!r}: {_in_short(error)}\n{without_network('model')}") from error
    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except (OSError, EntryNotFoundError) as error:
        raise UserError(f"tokenizer of {name}: {_in_short(error)}\n{without_network('model')}") from error


def check_reachable(name: str, kind: str) -> None:
    """Ask the hub for the repository once. Raises UserError in seconds where a download would retry for half a minute.

    In offline mode a data set may still come from the cache, and is left to `datasets`.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        if kind == "dataset":
            return
        raise UserError(f"{kind} {name}: not in the cache, and HF_HUB_OFFLINE is set\n{without_network(kind)}")
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=CONNECT_SECONDS)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{kind} {name}: the hub has none of this name that this account may read\n"
            "Check the name; for a private or gated one log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{kind} {name}: {_in_short(error)}\n{without_network(kind)}") from error
    except Exception as error:
        # Which classes stand for a dead network depends on the HTTP library that huggingface_hub uses.
        raise UserError(
            f"{kind} {name}: the Hugging Face hub cannot be reached: {_in_short(error)}\n{without_network(kind)}"
        ) from error


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
