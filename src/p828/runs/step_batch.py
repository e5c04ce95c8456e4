"""The batch of one step of a run, made again from the data as it is now, and its documents.

The data goes on from the newest checkpoint before the step that can be read, else from the beginning. The hash of a
step's rows, which its record has, says whether they are what was trained on.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from p828.config import Config, load, validate
from p828.config.values import flatten
from p828.data.batch import HASHES, Batch
from p828.data.build import tokenizer_of
from p828.data.loader import make_batch, open_order
from p828.data.order import SampleOrder, at_step
from p828.data.retry import Retry
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokens.format import open_manifest
from p828.data.trace import TracedRow, traced_rows
from p828.errors import ConfigError, P828Error
from p828.files import directory_near
from p828.runs import checkpoint, records
from p828.runs.checkpoint_content import config_of, reading_position
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, RECORDS_FILE, STEP_NAME, TOKENIZER_FILE, step_of
from p828.runs.manifest import read_state

MOST_RANKS, MOST_LEFT_OUT = 2**16, 2**20  # processes, and steps of a rollback, that are believed of damaged records
MOST_TOKENS = 2**30  # of a step, that are held at once
WEIGHTS = re.compile(r"data\.mixture(_steps|\[\d+\]\.weights)")  # keys that say which source comes when


@dataclass(frozen=True)
class StepBatch:
    """The rows of a step, as the data gives them now."""

    step: int
    batches: list[Batch]
    """On all ranks, in their order: rank r had those whose number is r modulo the ranks."""
    config: Config
    """With `train.gradient_accumulation` over all ranks."""
    tokenizer: Tokenizer
    start: Path | None
    """The checkpoint that the data went on from; None for the beginning."""
    recorded: str | None
    """The hash of the rows in the step's record; None where the run has no record of it."""

    @property
    def hash(self) -> str:
        """Of these rows, spelled as in records."""
        return f"{sum(batch.hash for batch in self.batches) % HASHES:08x}"

    @property
    def notes(self) -> list[str]:
        """A line on what each source of prepared data was made from, as its documents are numbered in its shards."""
        sources = zip(self.config.data.source_names, self.config.data.sources, strict=True)
        return [
            f"{name}: {data.prepared} was prepared from {open_manifest(Path(data.prepared)).source}"
            for name, data in sources
            if data.prepared
        ]

    @cached_property
    def rows(self) -> list[TracedRow]:
        """The rows with their documents."""
        return traced_rows(self.batches, self.config.data.source_names, self.tokenizer)


def documents_of_step(run: Path, step: int, report: Callable[[str], None] = lambda text: None) -> StepBatch:
    """The rows that a run was trained on at a step, counted from 1, made again.

    Reads text from the checkpoint's place on, or all that came before without one. `report` is given a line when a
    failed read is repeated. Raises ConfigError for what is no run or no step of it, and where the data is
    not that of the checkpoint; DataError and TransientReadError as reading it does.
    """
    about, saved = _opened(run, step)
    start = max((path for path in saved if step_of(path) < step), key=step_of, default=None)
    config = _config_at(run, step, saved)
    ranks = about.ranks(config) or (_ranks_of(saved[start]) if start else 1)
    train = dataclasses.replace(config.train, gradient_accumulation=config.train.gradient_accumulation * ranks)
    config = dataclasses.replace(config, train=train)
    if config.tokens_per_step > MOST_TOKENS:
        raise ConfigError(
            f"{run}: a step of {config.tokens_per_step:,} tokens; at most {MOST_TOKENS:,} are held at once"
        )
    tokenizer = _tokenizer_of(run, saved, config)
    order = open_order(config.data, train, tokenizer, Retry(config.data.read_retries, report=report))
    if start is None:
        batches = _replayed(order, 0, step, about.left_out, config)
    else:
        with reading_position(start):
            order.load_state_dict(at_step(saved[start]["data"], step_of(start)))
            batches = _replayed(order, step_of(start), step, about.left_out, config)
    return StepBatch(step, batches, config, tokenizer, start, about.rows)


def _opened(run: Path, step: int) -> tuple["_Records", dict[Path, dict[str, Any]]]:
    """What the records say, and the states of the checkpoints. Raises ConfigError if it is no run, or no step of it."""
    if not run.is_dir():
        advice = directory_near(run) or "a run's directory is accepted"
        raise ConfigError(f"{run}: no such directory; {advice}")
    about, saved = _Records.read(run, step), _positions(run)
    if not (saved or about.last_step or (run / CONFIG_FILE).is_file()):
        raise ConfigError(f"{run}: no run: it holds no {CONFIG_FILE}, no {RECORDS_FILE} and no checkpoint")
    last_step = max([about.last_step, *map(step_of, saved)])
    if not 1 <= step <= last_step:
        steps = f"steps 1 to {last_step:,} are accepted" if last_step else "it has made none"
        raise ConfigError(f"{run}: there is no step {step:,} of it; {steps}")
    return about, saved


def _replayed(order: SampleOrder, first: int, step: int, left_out: dict[int, int], config: Config) -> list[Batch]:
    """The micro-batches of `step`, past the steps after `first` and what rollbacks between them left out."""
    per_step, at = config.train.gradient_accumulation, first
    for back in sorted(number for number in left_out if first < number < step):
        order.skip((back - at + left_out[back]) * per_step)
        order.load_state_dict(at_step(order.state_dict(), back))
        at = back
    order.skip((step - 1 - at) * per_step)
    sources = len(config.data.sources)
    return [make_batch(next(order), config.model.mask_documents, sources) for _ in range(per_step)]


def _ranks_of(state: dict[str, Any]) -> int:
    """The number of processes that wrote a checkpoint."""
    ranks = state.get("ranks", 1)
    return ranks if isinstance(ranks, int) and ranks > 0 else 1


def _tokenizer_of(run: Path, saved: Iterable[Path], config: Config) -> Tokenizer:
    """The run's own, else a checkpoint's. Raises ConfigError if there is none."""
    files = [directory / TOKENIZER_FILE for directory in (run, *saved)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(f"{run}: holds no {TOKENIZER_FILE}, which its rows were made with")
    return tokenizer_of(config, file)


@dataclass(frozen=True)
class _Records:
    """What a run's records say of a step and of the data before it."""

    rows: str | None
    tokens: int | None
    """Of the step alone."""
    left_out: dict[int, int]
    """By the step that a rollback went back to: how many steps' data comes no more between it and the next step."""
    last_step: int

    @classmethod
    def read(cls, run: Path, step: int) -> "_Records":
        path = run / RECORDS_FILE
        if not path.is_file():
            return cls(None, None, {}, 0)
        wanted = rb'"step": ?(%d|%d)\b.*"rows"|"event": ?"rollback"' % (step - 1, step)
        tokens: dict[int, int] = {0: 0}
        rows, left_out = None, dict[int, int]()
        for record in records.matching(path, re.compile(wanted)):
            if record["kind"] == "step":
                tokens[record["step"]] = int(records.number(record.get("tokens")) or 0)
                rows = str(record.get("rows")) if record["step"] == step else rows
            elif type(record.get("left_out")) is int and 0 < record["left_out"] <= MOST_LEFT_OUT:
                back = record["step"]
                # a rollback to an earlier step takes what later ones had left out with it
                later = [left_out.pop(other) for other in list(left_out) if other >= back]
                left_out[back] = record["left_out"] + sum(later)
        last = (records.parsed(line) for line in records.tail(path, records.PIECE))
        last_step = max((record["step"] for record in last if record and record["kind"] == "step"), default=0)
        own = tokens[step] - tokens[step - 1] if step in tokens and step - 1 in tokens else None
        return cls(rows, own, left_out, last_step)

    def ranks(self, config: Config) -> int | None:
        """How many ranks trained the step, by its tokens; padding may be missing in these. None if they are unknown."""
        ranks = None if self.tokens is None else max(-(-self.tokens // config.tokens_per_step), 1)
        return ranks if ranks is not None and ranks <= MOST_RANKS else None


def _positions(run: Path) -> dict[Path, dict[str, Any]]:
    """The state of each of a run's checkpoints that has one which can be read, and is of a step of its own."""
    found: dict[Path, dict[str, Any]] = {}
    directory = run / CHECKPOINTS
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if STEP_NAME.fullmatch(path.name):
            try:
                state = read_state(path)
            except P828Error:  # damaged; another one, or the beginning, takes its place
                continue
            if isinstance(state.get("data"), dict) and state["data"]:
                found[path] = state
    return found


def _config_at(run: Path, step: int, saved: dict[Path, dict[str, Any]]) -> Config:
    """The run's configuration as the step was trained with: that of the first checkpoint from then on.

    Where data lies is what config.toml says, in which the newest start has written it. Raises ConfigError.
    """
    path = run / CONFIG_FILE
    later = min((path for path in saved if step_of(path) >= step), key=step_of, default=None)
    if later is None and not path.is_file():
        later = max(saved, key=step_of, default=None)
    if later is None:
        config = load(str(path))
        validate(config)
        return config
    with checkpoint.opened(later, names=()) as opened:
        then = config_of(opened)
    if not path.is_file():
        return then
    now = load(str(path))
    return dataclasses.replace(now, train=then.train, data=now.data if _weights(now) == _weights(then) else then.data)


def _weights(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(config).items() if WEIGHTS.fullmatch(key)}
