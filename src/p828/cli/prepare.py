"""`p828 prepare`: tokenize a run's text once, into files that training reads."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from p828.cli.configuration import ConfigArguments, read_configuration
from p828.config import Config, DataConfig
from p828.config.files import preset_names
from p828.data.fractions import short
from p828.data.retry import Retry
from p828.data.text.held_out import trained_on_too, unused_text_field
from p828.data.text.open import open_in_order
from p828.data.tokenizer.of_run import remarks
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.tokenizer_config import template_of_trained
from p828.data.tokens.directory import GOES_ON, failures_at_work, is_begun, open_output_dirs, resolve_tokenizer
from p828.data.tokens.format import MANIFEST_FILE, Manifest
from p828.errors import ConfigError, DataError, RunFailed, RunStopped, TransientReadError
from p828.train.log.console import waiting
from p828.train.signals import A_MOMENT, end_now

if TYPE_CHECKING:
    from p828.data.tokens.prepare import Preparation

USAGE = "p828 prepare CONFIG --data.prepared DIRECTORY [--section.key VALUE ...]"

KEPT = ("read", "training", "validation")  # what is counted and not left out
FRACTION_PER_LINE, SECONDS_PER_LINE = 0.1, 30.0  # a plain line comes after either
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(arguments: list[str]) -> None:
    config, _ = read_configuration(arguments, ConfigArguments, USAGE, _describe)
    wanted = [data for data in config.data.sources if data.prepared]
    if not wanted:
        key = "data.mixture[0].prepared" if config.data.mixture else "data.prepared"
        raise ConfigError(f"{key} is empty: give the directory to write to. Usage: {USAGE}")
    with waiting("loading PyTorch", _say):  # for the samples that data is packed into
        from p828.data.build import training_documents
    for data in wanted:
        documents = open_in_order(data, Retry(report=_say))  # a source that is not there ends it here
        if config.tokenizer.name == "train" and not is_begun(Path(data.prepared)):
            next(documents, None)  # and so does a first document that is none: the tokenizer would be lost
        for line in (*trained_on_too(data), *unused_text_field(data)):
            print(line, flush=True)
    directories = [Path(data.prepared) for data in wanted]
    with _ended_by_signals(directories), open_output_dirs(directories):
        made: list[Manifest] = []  # by this command
        tokenizer = resolve_tokenizer(config, directories, lambda: _documents(config))
        texts = training_documents(config.data, config.train.seed, tokenizer.template)
        for line in remarks(config.tokenizer, tokenizer, texts):
            print(line, flush=True)
        for data in wanted:
            was_complete = (Path(data.prepared) / MANIFEST_FILE).exists()
            with failures_at_work(lambda: bool(made)):
                manifest = _prepare(replace(config, data=data), tokenizer)
            if not was_complete:
                made.append(manifest)
            print(describe(manifest, data, tokenizer))
            if was_complete:
                print(f"it was complete already; all {_num_files(manifest)} files match their checksums")


@contextmanager
def _ended_by_signals(directories: Sequence[Path]) -> Iterator[None]:
    """A signal that asks the command to end ends it with RunStopped, saved; a second one at once, and not saved."""
    heard: list[float] = []

    def has_begun() -> bool:
        return any(map(is_begun, directories))

    def note(number: int, frame: FrameType | None) -> None:
        if not heard:
            heard.append(time.monotonic())
            _answer(signal.Signals(number), "saving what is made" if has_begun() else "ending")
            raise KeyboardInterrupt(signal.Signals(number).name)
        if number == signal.SIGINT or time.monotonic() > heard[0] + A_MOMENT:
            end_now(number)

    # One that is ignored, as after nohup, stays so.
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, note)
        yield
    except KeyboardInterrupt as interrupt:
        what = GOES_ON if has_begun() else "Nothing was made yet, and the same command begins again"
        raise RunStopped(f"stopped by {interrupt}. {what}") from None
    finally:
        for number, handler in before.items():
            is_late = number == signal.SIGHUP and bool(heard) and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if is_late else handler)


def _say(text: str) -> None:
    print(text, flush=True)


def _answer(number: signal.Signals, what: str) -> None:
    """At once, from within a signal's handler: what is being tokenized is waited for, and then saved."""
    text = f"{number.name}: {what}" + ("" if number == signal.SIGHUP else "; again to stop now")
    with suppress(OSError, ValueError):  # an output that is gone
        os.write(sys.stdout.fileno(), f"{chr(10) if sys.stdout.isatty() else ''}{text}\n".encode())


def _documents(config: Config) -> Iterator[str]:
    """Text to train a tokenizer on."""
    from p828.data.build import training_documents

    print(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens", flush=True)
    is_begun = False
    try:
        template = template_of_trained(config.tokenizer, config.data.has_conversations)
        for text in training_documents(config.data, config.train.seed, template):
            is_begun = True
            yield text
    except DataError as error:
        if not is_begun:
            raise
        for data in config.data.sources:
            next(open_in_order(data), None)  # where not even the first document can be read, it is wrong input
        raise RunFailed(f"{error}\nThe same command begins again once that is mended") from error
    except TransientReadError as error:
        raise RunFailed(f"{error}\nThe same command begins again when it can be read") from error


def _prepare(config: Config, tokenizer: Tokenizer) -> Manifest:
    """With a progress bar at a terminal, and a line now and then elsewhere."""
    from p828.data.tokens.prepare import prepare

    output = rich.console.Console(force_terminal=sys.stdout.isatty())
    columns = TextColumn("{task.percentage:>3.0f}%"), BarColumn(bar_width=None), TextColumn("{task.fields[shown]}")
    directory, started = Path(config.data.prepared), time.monotonic()
    first = -1.0
    shown_last = (-1.0, started)  # fraction and time of the last line

    def show_progress(preparation: "Preparation") -> None:
        nonlocal shown_last, first
        fraction, now = preparation.fraction_done(), time.monotonic()
        first = fraction if first < 0 else first  # what an interrupted command had done before
        left = (1 - fraction) * (now - started) / (fraction - first) if fraction > first else None
        rate = preparation.rate(now - started)
        shown = f"{short(preparation.tokens)} tokens  {rate / 1e6:.2f} M/s  {_time(left)} left"
        bar.update(task, completed=fraction, shown=shown)
        is_line_due = fraction >= shown_last[0] + FRACTION_PER_LINE or now > shown_last[1] + SECONDS_PER_LINE
        if is_line_due and not output.is_terminal:
            shown_last = fraction, now
            print(f"{directory}: {fraction:.0%}  {shown}", flush=True)

    def report(text: str) -> None:
        output.print(Text(text), soft_wrap=True)

    with Progress(*columns, console=output, expand=True, disable=not output.is_terminal) as bar:
        task = bar.add_task("", total=1.0, shown="")
        try:
            return prepare(config, directory, tokenizer, show_progress, Retry(config.data.read_retries, report=report))
        except TransientReadError as error:
            raise RunFailed(f"{error}\n{GOES_ON}") from error


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(manifest: Manifest, data: DataConfig, tokenizer: Tokenizer) -> str:
    from p828.data.tokens.read import Prepared

    training, validation = (sum(s.tokens for s in part) for part in (manifest.training, manifest.validation))
    counts = manifest.counts
    tokens = Prepared(Path(data.prepared), manifest, tokenizer.eos_id, tokenizer.vocab_size).tokens("training")
    cut = tokens.split_documents(data.sequence_length + 1) / counts["training"]
    lines = [
        f"{data.prepared}: {training:,} tokens to train on in {counts['training']:,} documents, "
        f"{validation:,} to validate on in {counts['validation']:,}",
        f"rows of {data.sequence_length:,} tokens, packing {data.packing}, cut {cut:.1%} of the documents",
        *(f"left out, {kind.replace('_', ' ')}: {count:,}" for kind, count in counts.items() if kind not in KEPT),
    ]
    return "\n".join(lines)


def _num_files(manifest: Manifest) -> int:
    return sum(len(shard.checksums) for shard in (*manifest.training, *manifest.validation))


def _describe(default: Config) -> str:
    return (
        f"{USAGE}\n\nCONFIG is a preset ({', '.join(preset_names())}), a .toml file or a run's "
        "directory. Interrupted, the same command goes on; complete, it compares the files with their checksums. "
        "`p828 train` with the same data.prepared then reads them."
    )
