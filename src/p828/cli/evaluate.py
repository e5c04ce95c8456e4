"""`p828 evaluate`: loss, perplexity and bits per byte of a trained model on validation text."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from p828.cli.flags import parse
from p828.config import Config, DataConfig, validate
from p828.data.feed import validation_batches
from p828.inference.evaluate import evaluate
from p828.inference.load import load_model

USAGE = "p828 evaluate CHECKPOINT [--rows N] [--micro-batch-size N] [--device DEVICE] [--data.key VALUE ...]"
DESCRIPTION = (
    f"{USAGE}\n\nWithout --data flags on the run's own validation text. The defaults of --rows, --micro-batch-size and "
    "--data are the run's."
)


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    rows: int = 64
    """Rows of data.sequence_length tokens, fewer if the text is shorter."""
    micro_batch_size: int = 8
    """Rows put through the model at once; changes speed and memory, not the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    data: DataConfig = field(default_factory=DataConfig)


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 evaluate", description=DESCRIPTION)
    loaded = load_model(given.checkpoint, given.device)
    run_config = loaded.config
    # Parsed again now that the run's own values can be the defaults.
    rows, micro_batch_size = run_config.evaluation.rows, run_config.train.micro_batch_size
    defaults = Arguments(given.checkpoint, rows, micro_batch_size, given.device, run_config.data)
    given = parse(Arguments, arguments, prog="p828 evaluate", default=defaults)
    config = dataclasses.replace(
        run_config,
        data=_validation_data(given.data, run_config),
        evaluation=dataclasses.replace(run_config.evaluation, rows=given.rows),
        train=dataclasses.replace(run_config.train, micro_batch_size=given.micro_batch_size),
    )
    validate(config)
    batches = validation_batches(config, loaded.tokenizer, given.rows, given.micro_batch_size)
    result = evaluate(loaded.model, batches, loaded.dtype)
    lines = (
        f"checkpoint     {loaded.path} (step {loaded.step})",
        f"loss           {result.loss:.5f} nats per token",
        f"perplexity     {result.perplexity:.5g}",
        f"bits per byte  {result.bits_per_byte:.5f}",
        f"on             {result.tokens:,} tokens, {result.bytes:,} bytes",
    )
    print("\n".join(lines), flush=True)


def _validation_data(given: DataConfig, run: Config) -> DataConfig:
    """Validation files or a hub data set that differ from the run's are what is meant, unless `kind` is given too."""
    validation, before = given.validation, run.data.validation
    if validation.kind == before.kind:
        if validation.files != before.files:
            validation = dataclasses.replace(validation, kind="files")
        elif (validation.hub_name, validation.split) != (before.hub_name, before.split):
            validation = dataclasses.replace(validation, kind="split")
    if validation.kind == "files":
        # The training source is not read then, so it need not be complete.
        given = dataclasses.replace(given, source=run.data.source, files=run.data.files)
    if validation != before:  # prepared data has the run's own
        mixture = tuple(dataclasses.replace(mixed, prepared="") for mixed in given.mixture)
        given = dataclasses.replace(given, prepared="", mixture=mixture)
    return dataclasses.replace(given, validation=validation)
