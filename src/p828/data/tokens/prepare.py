"""Tokenizes a source once into prepared data; interrupted, goes on where the disk is known to have everything."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p828.config import Config
from p828.data.retry import NO_RETRY, Retry
from p828.data.text.documents import DocumentStream
from p828.data.text.open import open_in_order, open_validation
from p828.data.text.shard import Shard
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.directory import (
    HASHES_FILE,
    PROGRESS_FILE,
    UNFINISHED,
    failures_at_work,
    read_progress,
    remove,
    writing,
)
from p828.data.tokens.filters import SeenTexts
from p828.data.tokens.format import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    check_shards,
    check_tokenizer,
    open_manifest,
    write_sealed,
)
from p828.data.tokens.settings import check_settings, settings, shards_of, with_paths_of
from p828.data.tokens.source_files import SourceFiles
from p828.data.tokens.text_reader import PARTS, Reader, TextBatch
from p828.data.tokens.write import BestFitWriter, PartialFile, ShardWriter
from p828.errors import ConfigError, DataError, RunFailed
from p828.system.slow_count import SlowCount

SAVE_EVERY = 5.0  # seconds
TOKENIZED_TOGETHER = 2  # batches: while the tokens of one become arrays, which one core does, others are encoded


def prepare(
    config: Config,
    directory: Path,
    tokenizer: Tokenizer,
    on_batch: Callable[["Preparation"], None],
    retry: Retry = NO_RETRY,
) -> Manifest:
    """Tokenize the one source of a configuration into a directory, or go on with that.

    Complete already, its shards are compared with their checksums instead, and the source's files with what they were.
    Raises ConfigError if it holds data made with other settings, from other files or another tokenizer, or cannot be
    written; DataError if a shard is wrong, or not even the first document can be taken; and RunFailed (which
    TransientReadError is) for what ends it at work, which keeps all that was made.
    """
    if not (directory / MANIFEST_FILE).exists():
        with writing(directory, at_work=False):
            directory.mkdir(parents=True, exist_ok=True)
        return Preparation(config, directory, tokenizer, retry).run(on_batch)
    manifest = open_manifest(directory)
    data = with_paths_of(manifest, config.data, retry)
    check_settings(manifest.settings, settings(config, data), directory / MANIFEST_FILE)
    check_tokenizer(manifest, tokenizer, directory)
    shards = shards_of(config.data, retry)
    changes = manifest.files.changes(shards, _read_files(shards, retry)) if manifest.files else ""
    if changes:
        raise ConfigError(
            f"{directory / MANIFEST_FILE}: the source's files are not those that were prepared: {changes}.\n"
            f"Give another directory as data.prepared, or remove {directory} to prepare them again"
        )
    check_shards(directory, (*manifest.training, *manifest.validation), retry=retry)
    return manifest


def _streams(config: Config, retry: Retry) -> list[DocumentStream]:
    """The source, and what is validated on, if that is text of its own."""
    streams = [open_in_order(config.data, retry)]
    if config.data.validation.kind != "held_out":
        streams.append(open_validation(config.data, retry))
    return streams


def _read_files(shards: list[Shard], retry: Retry) -> Callable[[int], None]:
    """Called with the number of shards that were read for their checksums."""
    return SlowCount(retry.report, f"reading the text's files for their checksums: {{:,}} of {len(shards):,} done").to


class Preparation:
    """A directory of prepared data in the making.

    What is on the disk belongs to the position in `progress.json`, or comes after it and is cut off before going on.
    """

    def __init__(self, config: Config, directory: Path, tokenizer: Tokenizer, retry: Retry) -> None:
        """Begin, or go on with what was interrupted.

        Raises ConfigError if that had other settings or has changed, and RunFailed if it cannot be written for now.
        """
        self.config, self.directory, self.tokenizer = config, directory, tokenizer
        self.seen = SeenTexts()
        streams = _streams(config, retry)
        self.shards, self.retry = [shard for stream in streams for shard in stream.shards], retry
        self.files = SourceFiles.of(self.shards)
        self.readers = [
            Reader(stream, part, config.prepare, config.data.validation, self.seen)
            for stream, part in zip(streams, PARTS, strict=False)
        ]
        self.reader_number = 0
        self._saved_at = 0.0
        self.tokens = self._tokens_before = 0
        self.spells_text = True
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        with writing(directory, at_work=False):
            progress = self._load()
            self._hashes = PartialFile(directory / HASHES_FILE, progress.get("hashes"))
            self.seen.load(np.frombuffer(b"".join(self._hashes.chunks()), "<u8"))
            self.writers = {part: self._writer(part, progress.get(part)) for part in PARTS}
            self._position = self.readers[self.reader_number].position()  # of what is written
            self._is_whole = True  # whether what is written is all up to there, and can be saved
            self._save()

    def _writer(self, part: str, state: dict[str, Any] | None) -> ShardWriter | BestFitWriter:
        shards = ShardWriter(self.directory, part, self.dtype, self.config.prepare.shard_tokens, state)
        if self.config.data.packing == "concatenate":
            return shards
        return BestFitWriter(shards, self.config.data.sequence_length + 1, state)

    def rate(self, seconds: float) -> float:
        """Tokens a second, over the `seconds` that this process has been at work."""
        return (self.tokens - self._tokens_before) / seconds

    def fraction_done(self) -> float:
        """About how much of the text has been read, from 0 to 1; of validation text of its own it is not known."""
        return self.readers[0].stream.fraction_read()

    def run(self, on_batch: Callable[["Preparation"], None]) -> Manifest:
        """Tokenize what is left and write the manifest. `on_batch` is called after every batch.

        However it ends, what is written by then is saved. Raises RunFailed, and DataError if nothing was made.
        """
        try:
            while True:
                self._read(on_batch)
                if self.reader_number + 1 == len(self.readers):
                    return self._conclude()
                self._is_whole = False
                self.reader_number += 1
                self._position = self.readers[self.reader_number].position()
                self._is_whole = True
        finally:
            if self._is_whole:
                with contextlib.suppress(OSError):  # what was saved before stands
                    self._save()

    def _read(self, on_batch: Callable[["Preparation"], None]) -> None:
        """What is left of the current reader's text."""
        with failures_at_work(lambda: any(reader.counts["read"] for reader in self.readers)):
            for batch, documents in self._tokenized(self.readers[self.reader_number]):
                with writing(self.directory):
                    self._write(batch, documents)
                on_batch(self)

    def _tokenized(self, reader: Reader) -> Iterator[tuple[TextBatch, dict[str, list[npt.NDArray[np.int64]]]]]:
        """Batches and their documents' tokens with EOS. Batches are read while those before are tokenized."""

        def tokenize(texts: dict[str, list[str]]) -> dict[str, list[npt.NDArray[np.int64]]]:
            return {part: self.tokenizer.encode_documents(some) for part, some in texts.items()}

        ahead: deque[tuple[TextBatch, Future[dict[str, list[npt.NDArray[np.int64]]]]]] = deque()
        with ThreadPoolExecutor(TOKENIZED_TOGETHER) as pool:
            for batch in reader:
                ahead.append((batch, pool.submit(tokenize, batch.texts)))
                if len(ahead) > TOKENIZED_TOGETHER:
                    before, future = ahead.popleft()
                    yield before, future.result()
            for before, future in ahead:
                yield before, future.result()

    def _write(self, batch: TextBatch, documents: dict[str, list[npt.NDArray[np.int64]]]) -> None:
        self._is_whole = False
        for part, writer in self.writers.items():
            writer.write(documents[part])
            self.tokens += sum(map(len, documents[part]))
        self.spells_text = self.spells_text and self.tokenizer.spells(
            batch.texts["validation"], documents["validation"]
        )
        self._hashes.add(np.array(batch.hashes, dtype="<u8").tobytes())
        self._position, self._is_whole = batch, True
        if time.monotonic() - self._saved_at >= SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        """Raises OSError, and ConfigError if the settings are more than a file of progress holds."""
        self._saved_at, self._is_whole = time.monotonic(), False
        batch = self._position
        progress = {
            "settings": settings(self.config),
            "tokenizer": self.tokenizer.fingerprint(),
            "reader": self.reader_number,
            "position": batch.position,
            "counts": [reader.counts for reader in self.readers[: self.reader_number]] + [batch.counts],
            "tokens": self.tokens,
            "spells_text": self.spells_text,
            "hashes": self._hashes.state_dict(),
            **{part: writer.state_dict() for part, writer in self.writers.items()},
        }
        write_sealed(self.directory / PROGRESS_FILE, progress)
        for writer in self.writers.values():
            writer.saved()
        self._is_whole = True

    def _load(self) -> dict[str, Any]:
        """Go back to the saved position, if there is one; what else is on the disk is left to the caller."""
        path = self.directory / PROGRESS_FILE
        if not path.exists():
            return {}
        progress = read_progress(path)
        check_settings(progress["settings"], settings(self.config), path)
        if progress["tokenizer"] != self.tokenizer.fingerprint():
            raise ConfigError(
                f"{self.directory / TOKENIZER_FILE}: changed since the preparation was interrupted. Remove "
                f"{self.directory} to begin again"
            )
        self.reader_number = progress["reader"]
        stream = self.readers[self.reader_number].stream
        difference = stream.difference(progress["position"])
        if difference:
            raise ConfigError(
                f"{path}: the preparation cannot go on with {stream.source}: {difference}.\n"
                f"Put the files back as they were, or remove {self.directory} to begin again"
            )
        stream.load_state_dict(progress["position"])
        for reader, counts in zip(self.readers, progress["counts"], strict=False):
            reader.counts = counts
        self.tokens = self._tokens_before = progress["tokens"]
        self.spells_text = progress.get("spells_text", False) is True  # not in one that an older version left
        return progress

    def _conclude(self) -> Manifest:
        counts: dict[str, int] = {}
        for reader in self.readers:
            for kind, count in reader.counts.items():
                counts[kind] = counts.get(kind, 0) + count
        source = self.readers[0].stream.source
        for part in PARTS:
            if not counts[part]:
                error = RunFailed if self.tokens else DataError
                raise error(f"{source}: nothing is left for {part}; documents: {counts}")
        with writing(self.directory):
            self._save()
        files = self.files.with_contents(self.shards, _read_files(self.shards, self.retry))
        with writing(self.directory):
            self._is_whole = False
            for writer in self.writers.values():
                writer.close()
            self._hashes.close()
            manifest = Manifest(
                source=source,
                settings=settings(self.config),
                tokenizer=self.tokenizer.fingerprint(),
                dtype=self.dtype.name,
                counts=counts,
                training=tuple(self.writers["training"].complete),
                validation=tuple(self.writers["validation"].complete),
                files=files,
                spells_text=self.spells_text,
            )
            manifest.write(self.directory)
            remove(self.directory, UNFINISHED)
        return manifest
