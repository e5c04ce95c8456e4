"""What a run shows before it starts, and when it is over."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from p828.config import Config, DataConfig, rules
from p828.data.amount import Amount, describe
from p828.data.bigram import bigram_loss
from p828.data.build import training_rows
from p828.data.fractions import short
from p828.data.order import held_out_rules
from p828.data.text.held_out import trained_on_too
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.distributed.group import ProcessGroup
from p828.engine.deepspeed.settings import DeepSpeedSettings
from p828.engine.interface import Engine
from p828.errors import ConfigError, DataError, RecordsFailed, RunPaused, RunStopped, TransientReadError
from p828.inference.evaluate import perplexity
from p828.interchange.origin import Origin
from p828.model import backend
from p828.model.costs import count_parameters, unused_vocabulary
from p828.runs import file_names
from p828.system.device import lacks_bfloat16
from p828.train.log.start import device_text, start_record
from p828.train.log.trackers import Trackers
from p828.train.resume import RunDirectory
from p828.train.signals import interruptible
from p828.train.trainer import Trainer

OUT_OF_PATIENCE = "stopped early, out of patience,"


def banner(
    config: Config,
    engine: Engine,
    ranks: ProcessGroup,
    settings: DeepSpeedSettings | None,
    amounts: Sequence[Amount],
    trackers: Trackers | None,
    origin: Origin | None,
) -> list[tuple[str, str]]:
    """Key and value of every line of what a run shows before it starts."""
    parameters = count_parameters(config.model)
    device = device_text(engine.device, ranks.size)
    if settings is not None:
        device += f" through DeepSpeed, ZeRO stage {settings.stage},"
    elif config.engine == "sharded":
        within = " within each host" if config.sharded.shard_within == "host" else ""
        device += f", ZeRO stage {config.sharded.stage}{within},"
    sources = [
        ("data", (f"{amount.name}: " if config.data.mixture else "") + _source(data, amount))
        for data, amount in zip(config.data.sources, amounts, strict=True)
    ]
    lines = [
        ("model", f"{short(parameters.total)} parameters, {short(parameters.active)} active"),
        *_begun_from(config, origin),
        ("device", f"{device} in {str(engine.dtype).removeprefix('torch.')}"),
        *sources,
        ("steps", _steps(config, ranks)),
        ("schedule", _schedule(config)),
        ("directory", str(config.run_dir)),
    ]
    return lines + (trackers.shown() if trackers is not None else [])


def report_start(
    config: Config, run: RunDirectory, trainer: Trainer, tokenizer: Tokenizer, about_data: list[str], changes: list[str]
) -> None:
    """Say and record how the run begins. `changes` are lines on what differs from the checkpoint it goes on from."""
    log, step = trainer.log, trainer.state.step
    log.event("started", step, **start_record(trainer.engine.device, trainer.ranks.size, run.versions))
    for line in about_data:
        log.console.print(line)
    if run.newest is None and (line := unused_vocabulary(config.model, tokenizer.vocab_size)):
        log.console.event(line)
    lines = [*run.damaged, *changes]
    if run.newest is not None:
        lines += [f"resumed from step {step}", *_nothing_left(trainer)]
    if run.changes and trainer.is_done():
        lines.append("config.toml and the checkpoint keep their settings, as no step follows with the changed ones")
    for line in lines:
        log.event("resume", step, line)
    read = [data for data in config.data.sources if not data.prepared]
    on_device = backend.remarks(config.model, trainer.engine.device, trainer.engine.dtype)
    for line in (*rules.remarks(config), *on_device, *(line for data in read for line in trained_on_too(data))):
        log.event("remark", step, line)
    if config.train.dtype == "auto" and lacks_bfloat16(trainer.engine.device):
        log.event("remark", step, "this GPU does not compute in bfloat16: the run is in float32")


def conclude(config: Config, trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Say what came out: losses, the bigram baseline, samples, and where the run is."""
    state, console = trainer.state, trainer.log.console
    loss = state.validation_loss
    if loss is not None:
        console.print(f"validation loss {loss:.3f}, perplexity {perplexity(loss):.1f}")
    if state.cut_documents:
        fraction = state.cut_documents / state.documents
        console.print(f"of {state.documents:,} documents, {fraction:.1%} were cut into several rows")
    if config.evaluation.bigram_baseline and trainer.ranks.is_first:
        _compare_with_bigram(config, trainer, tokenizer)
    if config.evaluation.prompts:
        with console.waiting("continuing the prompts"):
            samples = trainer.evaluator.samples(state.step)
        if samples:
            console.samples(samples)
    console.print(f"{config.run_dir} {_how_it_ended(trainer)} at step {state.step}")
    if state.saved_best_step not in (None, state.step):
        best = trainer.checkpointing.directory / file_names.name_of(state.saved_best_step)
        is_best_of_all = state.best_step == state.saved_best_step
        with_loss = f", with validation loss {state.best_loss:.3f}," if is_best_of_all else ""
        console.print(f"the best checkpoint{with_loss} is {best}")


def _how_it_ended(trainer: Trainer) -> str:
    if trainer.state.step >= trainer.train.steps:
        return "is complete"
    if trainer.is_out_of_time():
        return f"is complete after train.hours = {trainer.train.hours:g}"
    return OUT_OF_PATIENCE


@contextmanager
def recorded_end(trainer: Trainer) -> Iterator[None]:
    """Record how the run in the block ends, an event `ended`; a process that is killed leaves none.

    Its `state` is complete, paused, stopped or failed. Errors of the block are raised as they are.
    """

    def end(state: str, why: str) -> None:
        trainer.log.recorder.write("event", trainer.state.step, event="ended", state=state, why=why)

    try:
        yield
        how = _how_it_ended(trainer)
        end("stopped" if how == OUT_OF_PATIENCE else "complete", how)
    except RecordsFailed:
        raise
    except Exception as error:
        state = "paused" if isinstance(error, RunPaused) else "stopped" if isinstance(error, RunStopped) else "failed"
        with suppress(RecordsFailed):  # the error at hand may be of the records, and says more
            end(state, (str(error) or type(error).__name__).splitlines()[0])
        raise


def _compare_with_bigram(config: Config, trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Report the baseline's loss. It reads an epoch of text, more than the run may have read, which can fail."""
    log, step = trainer.log, trainer.state.step
    try:
        with log.console.waiting("counting pairs of tokens for the bigram baseline"):
            rows = training_rows(
                config.data, config.train.seed, tokenizer, held_out_rules(trainer.fetcher.loader.state_dict())
            )
            batches, vocab_size = trainer.evaluator.batches, tokenizer.vocab_size
            bigram = interruptible(lambda: bigram_loss(rows, batches, vocab_size))
    except (ConfigError, DataError, TransientReadError) as error:
        log.event("no_bigram_baseline", step, f"there is no bigram baseline: {error}")
        return
    log.event("bigram_baseline", step, loss=bigram)
    log.console.print(f"a bigram model of the same tokens gets {bigram:.3f}")


def _nothing_left(trainer: Trainer) -> list[str]:
    """A line where a run that is resumed has been trained for as long as it shall be."""
    train = trainer.train
    if trainer.state.step >= train.steps:
        longer = f"train.tokens = {train.tokens:g}" if train.tokens else f"train.steps = {train.steps:,}"
    elif trainer.is_out_of_time():
        longer = f"train.hours = {train.hours:g}"
    else:
        return []
    return [f"nothing is left to train with {longer}: a larger number trains the run longer"]


def _source(data: DataConfig, amount: Amount) -> str:
    if data.prepared:
        name = data.prepared
    elif data.source == "files":
        name = " ".join(data.files[:3]) + (f" and {len(data.files) - 3:,} more" if len(data.files) > 3 else "")
    elif data.source == "hf":
        name = " ".join(filter(None, (data.hub_name, data.hub_subset, data.hub_split)))
    else:
        name = "the standard library's source"
    epochs = "" if amount.epochs is None else f", {_count(amount.epochs)} epochs in this run"
    return f"{name}: {describe(amount)}{epochs}"


def _begun_from(config: Config, origin: Origin | None) -> list[tuple[str, str]]:
    """Which weights the run began with; a line, or none if they were drawn."""
    if not config.train.init_from:
        return []
    text = config.train.init_from if origin is None else f"{origin.path}, step {origin.step:,}"
    return [
        (
            "begun from",
            text + (f", upcycled to {config.model.n_routed_experts} experts" if config.train.upcycle else ""),
        )
    ]


def _steps(config: Config, ranks: ProcessGroup) -> str:
    a_step = config.tokens_per_step * ranks.size
    text = f"{config.train.steps:,} of {a_step:,} tokens, {short(config.train.steps * a_step)} in all"
    return text + (f"; at most {config.train.hours:g} hours" if config.train.hours else "")


def _schedule(config: Config) -> str:
    schedule, peak = config.schedule, config.optimizer.learning_rate
    rise = f"{schedule.warmup_steps:,} steps up to {peak:.3g}" if schedule.warmup_steps else f"from {peak:.3g}"
    lowest = peak * schedule.min_lr_ratio
    ends = {
        "cosine": f", then down to {lowest:.3g} at the last",
        "constant": ", which stays",
        "wsd": f", which stays but for the last {schedule.decay_steps:,}, down to {lowest:.3g}",
    }
    return f"{schedule.kind}: {rise}{ends[schedule.kind]}"


def _count(epochs: float) -> str:
    return f"{epochs:.1f}" if epochs >= 0.1 else f"{epochs:.2g}"
