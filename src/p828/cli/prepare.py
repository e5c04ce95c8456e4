"""`p828 prepare`: tokenize a run's text once, into files that training reads."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from p828 import config as configuration
from p828.cli.configuration import read_configuration
from p828.config import Config, DataConfig
from p828.data.feed import training_documents
from p828.data.manifest import Manifest
from p828.data.prepare import Preparation, prepare
from p828.data.prepared import Prepared
from p828.data.prepared_directory import entered, settle_tokenizer
from p828.data.retry import Retry
from p828.data.source import open_in_order
from p828.data.tokenizer import Tokenizer, remarks
from p828.errors import ReadFailed, RunStopped, UserError

USAGE = "p828 prepare CONFIG --data.prepared DIRECTORY [--section.key VALUE ...]"

KEPT = ("read", "training", "validation")  # what is counted and not left out
SHARE_PER_LINE, SECONDS_PER_LINE = 0.1, 30.0  # a plain line comes after either


def run(arguments: list[str]) -> None:
    config = read_configuration(arguments, USAGE, _describe)
    wanted = [data for data in config.data.sources if data.prepared]
    if not wanted:
        key = "data.mixture[0].prepared" if config.data.mixture else "data.prepared"
        raise UserError(f"{key} is empty: give the directory to write to. Usage: {USAGE}")
    for data in wanted:
        open_in_order(data)  # a source that is not there ends it here
    directories = [Path(data.prepared) for data in wanted]
    with entered(directories):
        tokenizer = settle_tokenizer(config, directories, lambda: _documents(config))
        for line in remarks(config.tokenizer, tokenizer, training_documents(config)):
            print(line, flush=True)
        for data in wanted:
            print(describe(_prepare(replace(config, data=data), tokenizer), data, tokenizer))


def _documents(config: Config) -> Iterator[str]:
    print(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens", flush=True)
    return training_documents(config)


def _prepare(config: Config, tokenizer: Tokenizer) -> Manifest:
    """With a progress bar at a terminal, and a line now and then elsewhere."""
    output = rich.console.Console(force_terminal=sys.stdout.isatty())
    columns = TextColumn("{task.percentage:>3.0f}%"), BarColumn(bar_width=None), TextColumn("{task.fields[shown]}")
    directory, started = Path(config.data.prepared), time.monotonic()
    first = -1.0
    said = (-1.0, started)  # share and time of the last line

    def report(preparation: Preparation) -> None:
        nonlocal said, first
        share, now = preparation.share_done(), time.monotonic()
        first = share if first < 0 else first  # what an interrupted command had done before
        left = (1 - share) * (now - started) / (share - first) if share > first else None
        rate = preparation.rate(now - started)
        shown = f"{preparation.tokens / 1e6:,.0f} M tokens  {rate / 1e6:.2f} M/s  {_time(left)} left"
        bar.update(task, completed=share, shown=shown)
        if not output.is_terminal and (share >= said[0] + SHARE_PER_LINE or now > said[1] + SECONDS_PER_LINE):
            said = share, now
            print(f"{directory}: {share:.0%}  {shown}", flush=True)

    def tell(text: str) -> None:
        output.print(Text(text), soft_wrap=True)

    with Progress(*columns, console=output, expand=True, disable=not output.is_terminal) as bar:
        task = bar.add_task("", total=1.0, shown="")
        try:
            return prepare(config, directory, tokenizer, report, Retry(config.data.read_retries, tell=tell))
        except ReadFailed as error:
            raise RunStopped(f"{error}\nThe same command goes on from there") from error


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(manifest: Manifest, data: DataConfig, tokenizer: Tokenizer) -> str:
    training, validation = (sum(s.tokens for s in part) for part in (manifest.training, manifest.validation))
    counts = manifest.counts
    tokens = Prepared(Path(data.prepared), manifest, tokenizer.eos_id, tokenizer.vocab_size).tokens("training")
    cut = tokens.cut_documents(data.sequence_length + 1) / counts["training"]
    lines = [
        f"{data.prepared}: {training:,} tokens to train on in {counts['training']:,} documents, "
        f"{validation:,} to validate on in {counts['validation']:,}",
        f"rows of {data.sequence_length:,} tokens, packing {data.packing}, cut {cut:.1%} of the documents",
        *(f"left out, {kind.replace('_', ' ')}: {count:,}" for kind, count in counts.items() if kind not in KEPT),
    ]
    return "\n".join(lines)


def _describe(default: Config) -> str:
    return (
        f"{USAGE}\n\nCONFIG is a preset ({', '.join(configuration.preset_names())}) or a .toml file. Interrupted, the "
        "same command goes on; complete, it compares the files with their checksums. `p828 train` with the same "
        "data.prepared then reads them."
    )
