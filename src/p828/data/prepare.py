"""Tokenizes a source once into prepared data; interrupted, goes on where the disk is known to have everything."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p828.config import Config
from p828.data.filters import SeenTexts
from p828.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, check_shards, check_tokenizer, open_manifest
from p828.data.prepared_directory import HASHES_FILE, PROGRESS_FILE, check_settings, read_progress, settings
from p828.data.retry import NO_RETRY, Retry
from p828.data.shard_writer import BestFitWriter, ShardWriter
from p828.data.source import open_in_order, open_validation
from p828.data.text_reader import PARTS, Reader, TextBatch
from p828.data.tokenizer import Tokenizer
from p828.errors import UserError
from p828.files import write_atomic

SAVE_EVERY = 5.0  # seconds
TOKENIZED_TOGETHER = 2  # batches: while the tokens of one become arrays, which one core does, others are encoded


def prepare(
    config: Config,
    directory: Path,
    tokenizer: Tokenizer,
    report: Callable[["Preparation"], None],
    retry: Retry = NO_RETRY,
) -> Manifest:
    """Tokenize the one source of a configuration into a directory, or go on with that.

    Complete already, its shards are compared with their checksums instead. Raises UserError if it holds data made with
    other settings or another tokenizer, a shard is wrong, or it cannot be written, and ReadFailed.
    """
    if not (directory / MANIFEST_FILE).exists():
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return Preparation(config, directory, tokenizer, retry).run(report)
    manifest = open_manifest(directory)
    check_settings(manifest.settings, settings(config), directory / MANIFEST_FILE)
    check_tokenizer(manifest, tokenizer, directory)
    check_shards(directory, (*manifest.training, *manifest.validation))
    return manifest


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """An error of the file system, while nothing is read, as one that the user can mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be written: {error.strerror}") from None


class Preparation:
    """A directory of prepared data in the making.

    What is on the disk belongs to the position in `progress.json`, or comes after it and is cut off before going on.
    """

    def __init__(self, config: Config, directory: Path, tokenizer: Tokenizer, retry: Retry) -> None:
        """Begin, or go on with what was interrupted. Raises UserError if that had other settings."""
        self.config, self.directory, self.tokenizer = config, directory, tokenizer
        self.seen = SeenTexts()
        self.readers = [Reader(open_in_order(config.data, retry), "training", config, self.seen)]
        if config.data.validation.kind != "held_out":
            self.readers.append(Reader(open_validation(config.data, retry), "validation", config, self.seen))
        self.reader_number = 0
        self._saved_at = 0.0
        self.tokens = self._tokens_before = 0
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        progress = self._load()
        with _writing(directory):
            self._hashes = (directory / HASHES_FILE).open("ab")
            self._hashes.truncate(8 * progress.get("hashes", 0))
            self._hashes.seek(0, os.SEEK_END)  # its place is still the end that was cut off
            self.writers = {part: self._writer(part, progress.get(part)) for part in PARTS}
            self._save(self.readers[self.reader_number].position())

    def _writer(self, part: str, state: dict[str, Any] | None) -> ShardWriter | BestFitWriter:
        shards = ShardWriter(self.directory, part, self.dtype, self.config.prepare.shard_tokens, state)
        if self.config.data.packing == "concatenate":
            return shards
        return BestFitWriter(shards, self.config.data.sequence_length + 1, state)

    def rate(self, seconds: float) -> float:
        """Tokens a second, if this process has been at work for so many seconds."""
        return (self.tokens - self._tokens_before) / seconds

    def share_done(self) -> float:
        """About how much of the text has been read, from 0 to 1; of validation text of its own it is not known."""
        return self.readers[0].stream.share_read()

    def run(self, report: Callable[["Preparation"], None]) -> Manifest:
        """Tokenize what is left and write the manifest. `report` is called after every batch."""
        while self.reader_number < len(self.readers):
            for batch, documents in self._tokenized(self.readers[self.reader_number]):
                with _writing(self.directory):
                    self._write(batch, documents)
                report(self)
            self.reader_number += 1
        return self._conclude()

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
        for part, writer in self.writers.items():
            writer.write(documents[part])
            self.tokens += sum(map(len, documents[part]))
        self._hashes.write(np.array(batch.hashes, dtype="<u8").tobytes())
        if time.monotonic() - self._saved_at >= SAVE_EVERY:
            self._save(batch)

    def _save(self, batch: TextBatch) -> None:
        self._saved_at = time.monotonic()
        self._hashes.flush()
        os.fsync(self._hashes.fileno())
        progress = {
            "settings": settings(self.config),
            "tokenizer": self.tokenizer.fingerprint(),
            "reader": self.reader_number,
            "position": batch.position,
            "counts": [reader.counts for reader in self.readers[: self.reader_number]] + [batch.counts],
            "tokens": self.tokens,
            "hashes": self._hashes.tell() // 8,
            **{part: writer.state_dict() for part, writer in self.writers.items()},
        }
        write_atomic(self.directory / PROGRESS_FILE, json.dumps(progress))

    def _load(self) -> dict[str, Any]:
        """Go back to the saved position, if there is one; the writers' states are left to the caller."""
        path = self.directory / PROGRESS_FILE
        if not path.exists():
            return {}
        progress = read_progress(path)
        check_settings(progress["settings"], settings(self.config), path)
        hashes = np.fromfile(self.directory / HASHES_FILE, "<u8", progress["hashes"])
        if progress["tokenizer"] != self.tokenizer.fingerprint() or len(hashes) < progress["hashes"]:
            what = HASHES_FILE if len(hashes) < progress["hashes"] else TOKENIZER_FILE
            raise UserError(
                f"{self.directory / what}: changed since the preparation was interrupted. Remove "
                f"{self.directory} to begin again"
            )
        self.reader_number = progress["reader"]
        try:
            self.readers[self.reader_number].stream.load_state_dict(progress["position"])
        except UserError:
            raise UserError(
                f"{path}: the source's files changed since the preparation was interrupted. Remove "
                f"{self.directory} to begin again"
            ) from None
        for reader, counts in zip(self.readers, progress["counts"], strict=False):
            reader.counts = counts
        self.tokens = self._tokens_before = progress["tokens"]
        self.seen.load(hashes)
        return progress

    def _conclude(self) -> Manifest:
        counts: dict[str, int] = {}
        for reader in self.readers:
            for kind, count in reader.counts.items():
                counts[kind] = counts.get(kind, 0) + count
        source = self.readers[0].stream.source
        for part in PARTS:
            if not counts[part]:
                raise UserError(f"{source}: nothing is left for {part}; documents: {counts}")
        with _writing(self.directory):
            for writer in self.writers.values():
                writer.close()
            manifest = Manifest(
                source=source,
                settings=settings(self.config),
                tokenizer=self.tokenizer.fingerprint(),
                dtype=self.dtype.name,
                counts=counts,
                training=tuple(self.writers["training"].complete),
                validation=tuple(self.writers["validation"].complete),
            )
            write_atomic(self.directory / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1))
            self._hashes.close()
            for name in (PROGRESS_FILE, HASHES_FILE):
                (self.directory / name).unlink(missing_ok=True)
        return manifest
