"""`p828 evaluate`: loss, perplexity and bits per byte of a trained model on validation text."""

import ast
import dataclasses
import inspect
import itertools
import typing
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from p828.cli.flags import HELP, changed, parse_given
from p828.cli.given import check_given
from p828.cli.output import note
from p828.config import Config, DataConfig, facts_by_key, facts_of, validate
from p828.config.files import implied
from p828.config.rules import check_text
from p828.config.values import shown
from p828.data.batch import Batch
from p828.data.build import all_validation_batches, validation_batches
from p828.data.tokens.settings import with_prepared_sources
from p828.errors import ConfigError
from p828.inference.evaluate import evaluate
from p828.inference.load import LoadedModel, load_model
from p828.train.console import waiting
from p828.train.signals import interruptible

USAGE = "p828 evaluate CHECKPOINT [--rows N] [--micro-batch-size N] [--device DEVICE] [--data.key VALUE ...]"
DESCRIPTION = (
    f"{USAGE}\n\nWithout --data flags on the run's own validation text. --data.files measures all of the given files, "
    "held out or not. The defaults of --rows, --micro-batch-size and --data are the run's; of given files it is every "
    "row."
)


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
    with waiting("loading the model", note):
        loaded = load_model(own.checkpoint, own.device)
    data = _data_flags(flags)
    config = with_prepared_sources(
        dataclasses.replace(loaded.config, data=_data(loaded.config.data, data)), [f"data.{key}" for key in data]
    )
    config = dataclasses.replace(
        loaded.config,
        data=config.data,
        evaluation=dataclasses.replace(loaded.config.evaluation, rows=flags.get("rows", loaded.config.evaluation.rows)),
        train=dataclasses.replace(
            loaded.config.train,
            micro_batch_size=flags.get("micro_batch_size", loaded.config.train.micro_batch_size),
        ),
    )
    validate(config)
    check_given(config, [f"data.{key}" for key in data], loaded.config, in_files=())
    with waiting("measuring", note):
        result = interruptible(lambda: evaluate(loaded.model, _batches(config, loaded, flags), loaded.dtype))
    lines = [
        f"checkpoint     {loaded.path} (step {loaded.step})",
        f"loss           {result.loss:.5f} nats per token",
        f"perplexity     {result.perplexity:.5g}",
        f"bits per byte  {result.bits_per_byte:.5f}",
        f"on             {result.tokens:,} tokens, {result.bytes:,} bytes",
    ]
    if any(key.startswith("data.") for key in flags):
        lines.append(f"text           {_text(config, flags)}")
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
            told = tyro.conf.arg(help=texts.get(own.name, ""), help_behavior_hint="(default: the run's)")
            fields.append((own.name, Annotated[kind, told], field(default=own.default)))
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


def _data_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """What is given for `data`, without that prefix; given files are what is measured, held out or not."""
    data = {key: value for key, value in flags.items() if key.startswith("data.")}
    if "data.files" in data and not any(key.startswith("data.validation.") for key in data):
        files = data.pop("data.files")
        if data.pop("data.source", "files") != "files":
            raise ConfigError(f'data.files = {shown(list(files))}: accepted with data.source = "files"')
        data["data.validation.files"] = files
    data = {**implied(data), **data}
    return {key.removeprefix("data."): value for key, value in data.items()}


def _data(run: DataConfig, flags: dict[str, Any]) -> DataConfig:
    """The run's data with what is given of it."""
    data: DataConfig = changed(run, flags)
    if "files" in flags and "validation.files" in flags:
        raise ConfigError("data.files and data.validation.files are both given: either names the files to measure")
    validation = data.validation
    is_other = validation.kind == "files" or (validation.kind == "split" and validation.hub_name)
    if is_other and not {*flags}.isdisjoint(("hub_name", "hub_subset", "hub_split")):
        raise ConfigError(
            f'data.hub_name and its like: with data.validation.kind = "{validation.kind}", other text is measured; '
            "give --data.validation.hub-name and --data.validation.split"
        )
    if "validation.files" in flags and data.validation.kind == "files":
        # No other source is read, so it need not be complete.
        text_field = flags.get("text_field", run.sources[0].text_field)
        return dataclasses.replace(
            data, source=run.source, files=run.files, text_field=text_field, mixture=(), mixture_steps=(0,), prepared=""
        )
    is_the_runs = all(getattr(data, key) == getattr(run, key) for key in ("validation", "source", "files", "hub_name"))
    if is_the_runs or "prepared" in flags:
        return data
    # Prepared data has the run's own validation text: other text is read as text.
    mixture = tuple(dataclasses.replace(mixed, prepared="") for mixed in data.mixture)
    return dataclasses.replace(data, prepared="", mixture=mixture)


def _is_every_row(config: Config, flags: Collection[str]) -> bool:
    """Whether files were given, and no number of rows of them."""
    are_given = "data.files" in flags or "data.validation.files" in flags
    return config.data.validation.kind == "files" and are_given and "rows" not in flags


def _batches(config: Config, loaded: LoadedModel, flags: Collection[str]) -> Iterable[Batch]:
    size, mask_documents = config.train.micro_batch_size, config.model.mask_documents
    if _is_every_row(config, flags):
        return all_validation_batches(config.data, loaded.tokenizer, mask_documents, size, note)
    rules = loaded.rules if _texts(config) == _texts(loaded.config) else []
    rows = config.evaluation.rows
    return validation_batches(config.data, loaded.tokenizer, mask_documents, rows, size, rules, tell=note)


def _texts(config: Config) -> list[tuple[Any, ...]]:
    """What text the sources are."""
    return [(s.source, s.files, s.text_field, s.hub_name, s.hub_subset, s.hub_split) for s in config.data.sources]


def _text(config: Config, flags: Collection[str]) -> str:
    """What was measured, in words."""
    data, validation = config.data, config.data.validation
    rows = "all rows" if _is_every_row(config, flags) else f"at most {config.evaluation.rows:,} rows"
    rows = f"{rows} of {data.sequence_length:,} tokens"
    if validation.kind == "files":
        return f"{rows} of {shown(list(validation.files))}"
    if validation.kind == "split":
        return f"{rows} of the split {validation.split!r} of {validation.hub_name or data.hub_name}"
    source = {"python": "the standard library's source", "files": shown(list(data.files)), "hf": data.hub_name}
    what = "the mixture's sources" if data.mixture else data.prepared or source[data.source]
    return f"{rows} of the share of {what} that is held out from training, {validation.fraction:g}"
