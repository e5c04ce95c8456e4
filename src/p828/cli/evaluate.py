"""`p828 evaluate`: loss, perplexity and bits per byte of a trained model on text, or its results at tasks."""

import dataclasses
import os
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from p828.cli.flags import HELP, parse_given
from p828.cli.output import loading_pytorch
from p828.config import Config, DataConfig, facts_by_key, facts_of
from p828.config.rules import check_path, check_text
from p828.errors import ConfigError
from p828.inference.tasks.own_names import OWN_NAMES

USAGE = (
    "p828 evaluate CHECKPOINT [--tasks NAME,NAME] [--context N] [--rows N] [--micro-batch-size N] [--device DEVICE] "
    "[--json FILE] [--data.key VALUE ...]"
)
DESCRIPTION = (
    f"{USAGE}\n\nWithout --data flags on the run's own validation text. --data.files measures all of the given files, "
    "held out or not. The defaults of --rows, --micro-batch-size and --data are the run's; of given files it is every "
    "row. --tasks measures how well the model does at tasks, in place of its loss on text: cloze_english and "
    "cloze_python are p828's own, and all others are those of lm-eval (pip install 'p828[evaluate]'). "
    "--context shows the perplexity by position in the context, with and without YaRN: how far the model reads."
)
OF_THE_RUN = tyro.conf.arg(help_behavior_hint="(default: the run's)")
OF_TASKS = ("tasks_path", "limit", "num_fewshot")
OF_TEXT = ("rows", "data.", "context", "model.")
FACTOR = "model.rope_scaling.factor"


@dataclass(frozen=True)
class RopeFactor:
    factor: Annotated[float, OF_THE_RUN] = 1.0
    """YaRN's factor on the trained context, with --context."""


@dataclass(frozen=True)
class ModelFlags:
    """What --context may change of the model."""

    rope_scaling: RopeFactor = field(default_factory=RopeFactor)


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME,NAME", help_behavior_hint="(default: none)")] = ()
    """Tasks, groups and tags to measure in place of a loss: cloze_english, cloze_python, or names of lm-eval."""
    tasks_path: str = ""
    """Directory of further tasks, in lm-eval's format."""
    limit: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: all)")] = 0
    """Use the first items of each task only, to try it out."""
    num_fewshot: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: the task's)")] = 0
    """Solved examples before each question of lm-eval's tasks."""
    context: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: none)")] = 0
    """Show the perplexity by position in rows of this many tokens, with and without YaRN."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Also write the results to this file."""
    rows: Annotated[int, OF_THE_RUN] = 64
    """Rows of data.sequence_length tokens, fewer if the text is shorter."""
    micro_batch_size: Annotated[int, OF_THE_RUN] = 8
    """Rows put through the model at once; changes speed and memory, not the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    model: ModelFlags = field(default_factory=ModelFlags)
    data: DataConfig = field(default_factory=DataConfig)


def run(arguments: list[str]) -> None:
    if any(argument in HELP for argument in arguments):
        parse_given(_for_help(), ["--help"], prog="p828 evaluate", description=DESCRIPTION)  # ends with it
    own, flags = parse_given(Arguments, arguments, prog="p828 evaluate", description=DESCRIPTION)
    names = [name for given in own.tasks for name in given.split(",") if name]
    _check(own, names, flags)
    with loading_pytorch():
        from p828.cli.measuring import measure
    measure(own.checkpoint, own.device, names, flags, own.json)


def _check(own: Arguments, names: Collection[str], flags: Collection[str]) -> None:
    """Raises ConfigError for what would change nothing, and for a file that could not be written later."""
    for key, name in (("checkpoint", "CHECKPOINT"), ("tasks_path", "--tasks-path"), ("json", "--json")):
        check = check_path if key in flags or key == "checkpoint" else check_text
        check(name, getattr(own, key))
    facts, is_of_tasks = facts_by_key(Config), "tasks" in flags
    if is_of_tasks and not names:
        raise ConfigError(f"--tasks is empty: names are accepted, as {','.join(OWN_NAMES)}")
    for key in flags:
        flag = f"--{key.replace('_', '-')}"
        if key in OF_TASKS and not is_of_tasks:
            raise ConfigError(f"{flag}: accepted with --tasks")
        if key.startswith(OF_TEXT) and is_of_tasks:
            raise ConfigError(f"{flag}: accepted without --tasks, which have texts of their own")
        if key.startswith("data.") and facts_of(facts, key).only_trains:
            raise ConfigError(f"{flag}: of training alone; it changes nothing that is measured")
    if FACTOR in flags and "context" not in flags:
        raise ConfigError("--model.rope-scaling.factor: accepted with --context")
    if {"context", "data.sequence_length"} <= set(flags):
        raise ConfigError("--data.sequence-length: accepted without --context, which is the length of a row")
    for key, least in (("limit", 1), ("num_fewshot", 0), ("micro_batch_size", 1), ("context", 1)):
        if key in flags and getattr(own, key) < least:
            raise ConfigError(f"{key} = {getattr(own, key)}: a whole number of at least {least} is accepted")
    if "num_fewshot" in flags and set(names) <= set(OWN_NAMES):
        raise ConfigError("--num-fewshot: accepted with tasks of lm-eval; p828's own have no examples")
    if own.json and (Path(own.json).is_dir() or not os.access(Path(own.json).parent, os.W_OK)):
        raise ConfigError(f"--json {own.json}: the name of a file in a directory that can be written is accepted")


def _for_help() -> type[Any]:
    """The arguments with, of `data`, what is measured with, and the run's values as the defaults."""
    data = _of_the_run(DataConfig, "data.")
    return dataclasses.make_dataclass(
        Arguments.__name__, [("data", data, field(default_factory=data))], bases=(Arguments,), frozen=True
    )


def _of_the_run(cls: type[Any], table: str) -> type[Any]:
    """A section whose help says that its defaults are the run's, without what only trains."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for own in dataclasses.fields(cls):
        kind, key = kinds[own.name], f"{table}{own.name}"
        if dataclasses.is_dataclass(kind):
            inner = _of_the_run(typing.cast(type[Any], kind), f"{key}.")
            fields.append((own.name, inner, field(default_factory=inner)))
        else:
            marker = tyro.conf.Suppress if facts_of(facts_by_key(Config), key).only_trains else OF_THE_RUN
            fields.append((own.name, Annotated[kind, marker], field(default=own.default)))
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True)
