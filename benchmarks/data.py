"""Measure the way of the data on this machine: tokenizing, reading prepared rows, and what either takes in memory.

usage: python benchmarks/data.py TEXT.jsonl[.xz] TOKENIZER.json [--megabytes N]      text in the field `text`
"""

import argparse
import json
import lzma
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from p828.config import Config, load
from p828.data.loader import open_loader
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.prepare import prepare

SECONDS = 5.0
TIMES_MORE = (1, 10, 100)


def configuration(text: Path, prepared: Path, packing: str = "concatenate") -> Config:
    config = load("60m")
    validation = replace(config.data.validation, kind="held_out")
    data = replace(
        config.data, source="files", files=(str(text),), text_field="text", prepared=str(prepared),
        packing=packing, validation=validation,
    )  # fmt: skip
    return replace(config, data=data)


def first_lines(name: str, size: float) -> list[str]:
    lines = []
    with lzma.open(name, "rt") if name.endswith(".xz") else open(name) as file:
        for line in file:
            lines.append(str(line))
            size -= len(lines[-1].encode())
            if size < 0:
                break
    return lines


def plain_rate(texts: list[str], tokenizer: Tokenizer) -> float:
    """Bytes of text a second through plain batch encoding, 1,000 documents at a time."""
    started = time.perf_counter()
    for i in range(0, len(texts), 1000):
        tokenizer.inner.encode_batch(texts[i : i + 1000], add_special_tokens=False)
    return sum(len(text.encode()) for text in texts) / (time.perf_counter() - started)


def prepare_rate(texts: list[str], config: Config, tokenizer: Tokenizer) -> float:
    """The same of `p828 prepare`, from file to file."""
    started = time.perf_counter()
    prepare(config, Path(config.data.prepared), tokenizer, lambda preparation: None)
    return sum(len(text.encode()) for text in texts) / (time.perf_counter() - started)


def row_rates(config: Config, tokenizer: Tokenizer) -> tuple[float, float]:
    """Rows and tokens a second out of the loader, in pinned memory if there is a GPU."""
    with open_loader(
        config.data, config.train, tokenizer, config.model.mask_documents, pin_memory=torch.cuda.is_available()
    ) as loader:
        loader.start()
        for _ in range(100):
            next(loader)
        started, tokens, rows = time.perf_counter(), 0, 0
        while time.perf_counter() - started < SECONDS:
            batch = next(loader)
            tokens, rows = tokens + batch.num_targets, rows + len(batch.tokens_BS)
        return rows / SECONDS, tokens / SECONDS


def own_memory(work: Callable[..., None], *arguments: object) -> float:
    """Megabytes that a process of its own has in private memory at most, above what it begins with."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_watched, args=(queue, work, *arguments))
    process.start()
    megabytes: float = queue.get()
    process.join()
    return megabytes


def _watched(queue: "multiprocessing.Queue[float]", work: Callable[..., None], *arguments: object) -> None:
    import threading

    before, most, stop = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    work(*arguments)
    stop.set()
    thread.join()
    queue.put(most[0] - before)


def anonymous() -> float:
    """Megabytes of this process that are no file's pages, which the system may drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def prepare_once(config: Config, tokenizer_file: str) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_file, config.tokenizer.eos_token)
    prepare(config, Path(config.data.prepared), tokenizer, lambda preparation: None)


def read_rows(config: Config, tokenizer_file: str) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_file, config.tokenizer.eos_token)
    with open_loader(config.data, config.train, tokenizer, config.model.mask_documents) as loader:
        for _ in range(500):
            next(loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("tokenizer")
    parser.add_argument("--megabytes", type=float, default=40)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(arguments.tokenizer, load("60m").tokenizer.eos_token)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        lines = first_lines(arguments.text, arguments.megabytes * 1e6)
        size = sum(len(line.encode()) for line in lines)
        text = directory / "text.jsonl"
        text.write_text("".join(lines))
        texts = [json.loads(line)["text"] for line in lines]

        print(f"{size / 1e6:.0f} MB of text, {torch.get_num_threads()} cores, GPU: {torch.cuda.is_available()}")
        for i, packing in enumerate(("concatenate", "best_fit", "concatenate", "best_fit")):
            config = configuration(text, directory / f"prepared-{i}", packing)
            plain, prepared = plain_rate(texts, tokenizer), prepare_rate(texts, config, tokenizer)
            print(
                f"plain batch encoding {plain / 1e6:.2f} MB/s, p828 prepare by {packing} {prepared / 1e6:.2f} MB/s: "
                f"{prepared / plain:.2f}"
            )
            rows, tokens = row_rates(config, tokenizer)
            print(f"from {packing} shards: {rows:,.0f} rows/s, {tokens / 1e6:.2f} M tokens/s")

        few = "".join(lines[: len(lines) * 10 // int(size / 1e6)])  # 10 MB: some batches
        for times in TIMES_MORE:
            source = directory / f"{times}-times.jsonl"
            with source.open("w") as file:
                for _ in range(times):
                    file.write(few)
            config = configuration(source, directory / f"memory-{source.stem}")
            made = own_memory(prepare_once, config, arguments.tokenizer)
            read = own_memory(read_rows, config, arguments.tokenizer)
            print(
                f"{source.stat().st_size / 1e6:.1f} MB of text: prepare {made:.0f} MB of memory, reading {read:.0f} MB"
            )


if __name__ == "__main__":
    main()
