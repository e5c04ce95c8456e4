"""`p828 evaluate`: loss, perplexity and bits per byte of a trained model on validation text."""

import ast
import dataclasses
import inspect
import itertools
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from p828.cli.flags import HELP, parse_given
from p828.config import Config, DataConfig, facts_by_key, facts_of
from p828.config.rules import check_text
from p828.errors import ConfigError, warn
from p828.inference.evaluate import evaluate
from p828.inference.load import load_model
from p828.inference.measured_text import batches_of, in_words, measured_config
from p828.train.console import waiting
from p828.train.signals import interruptible

USAGE = "p828 evaluate CHECKPOINT [--rows N] [--micro-batch-size N] [--device DEVICE] [--data.key VALUE ...]"
DESCRIPTION = (
    f"{USAGE}\n\nWithout --data flags on the run's own validation text. --data.files measures all of the given files, "
    "held out or not. The defaults of --rows, --micro-batch-size and --data are the run's; of given files it is every "
    "row."
)
NO_BYTES = "not known: the tokens of the prepared data are decoded to other text; --data.files measures text itself"


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    rows: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: the run's)")] = 64
    """Rows of data.sequence_length tokens, fewer if the text is shorter."""
    micro_batch_size: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: the run's)")] = 8
    """Rows put through the model at once; changes speed and memory, not the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    data: DataConfig = field(default_factory=DataConfig)


def run(arguments: list[str]) -> None:
    if any(argument in HELP for argument in arguments):
        parse_given(_described(Arguments), ["--help"], prog="p828 evaluate", description=DESCRIPTION)  # ends with it
    own, flags = parse_given(Arguments, arguments, prog="p828 evaluate", description=DESCRIPTION)
    check_text("CHECKPOINT", own.checkpoint)
    facts = facts_by_key(Config)
    for key in flags:
        if key.startswith("data.") and facts_of(facts, key).only_trains:
            raise ConfigError(f"--{key.replace('_', '-')}: of training alone; it changes nothing that is measured")
    with waiting("loading the model", warn):
        loaded = load_model(own.checkpoint, own.device)
    config = measured_config(loaded, flags)
    with waiting("measuring", warn):
        result = interruptible(lambda: evaluate(loaded.model, batches_of(config, loaded, flags, warn), loaded.dtype))
    lines = [
        f"checkpoint     {loaded.path} (step {loaded.step})",
        f"loss           {result.loss:.5f} nats per token",
        f"perplexity     {result.perplexity:.5g}",
        f"bits per byte  {NO_BYTES if result.bits_per_byte is None else format(result.bits_per_byte, '.5f')}",
        f"on             {result.tokens:,} tokens" + ("" if result.bytes is None else f", {result.bytes:,} bytes"),
    ]
    if any(key.startswith("data.") for key in flags):
        lines.append(f"text           {in_words(config, flags)}")
    print("\n".join(lines), flush=True)


def _described(cls: type[Any], table: str = "") -> type[Any]:
    """The same class for the help: of `data` what is measured with, and the run's values as the defaults."""
    kinds, texts = typing.get_type_hints(cls, include_extras=True), _texts_of_fields(cls)
    fields: list[tuple[str, Any, Any]] = []
    for own in dataclasses.fields(cls):
        kind, name = kinds[own.name], f"{table}{own.name}"
        if dataclasses.is_dataclass(kind):
            inner = _described(typing.cast(type[Any], kind), "" if name == "data" else f"{name}.")
            fields.append((own.name, inner, field(default_factory=inner)))
        elif cls is Arguments:
            default = {} if own.default is dataclasses.MISSING else {"default": own.default}
            fields.append((own.name, Annotated[kind, tyro.conf.arg(help=texts.get(own.name, ""))], field(**default)))
        elif not facts_of(facts_by_key(Config), f"data.{name}").only_trains:
            with_help = tyro.conf.arg(help=texts.get(own.name, ""), help_behavior_hint="(default: the run's)")
            fields.append((own.name, Annotated[kind, with_help], field(default=own.default)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def _texts_of_fields(cls: type[Any]) -> dict[str, str]:
    """The text below each field in the source of a dataclass and those that it extends."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(base)).body[0]).body
        for own, text in itertools.pairwise(body):
            if not isinstance(own, ast.AnnAssign) or not isinstance(own.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[own.target.id] = inspect.cleandoc(str(text.value.value))
    return found
