"""Builds a run's parts, in the order in which their inputs can be wrong, and sets the loop off."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from p828.config import Config, EvaluationConfig, load, validate, with_steps
from p828.data.amount import amounts, repeated
from p828.data.batch import Batch
from p828.data.build import (
    held_out_lines,
    prepared_tokenizer,
    template_lines,
    tokenizer_of,
    training_documents,
    validation_batches,
    validation_sources,
)
from p828.data.loader import Loader, open_loader
from p828.data.retry import Retry
from p828.data.text.hub import pinned
from p828.data.text.open import open_training, open_validation
from p828.data.tokenizer.of_run import remarks
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.tokenizer_config import config_json, save_template
from p828.data.tokens.format import open_manifest
from p828.distributed.engine_of_processes import for_processes, is_left_to_p828
from p828.distributed.group import ProcessGroup, joined
from p828.distributed.launcher import launched
from p828.distributed.links import check_topology
from p828.distributed.same_settings import check_same_settings
from p828.engine.deepspeed.engine import DeepSpeedEngine, check_deepspeed
from p828.engine.deepspeed.settings import DeepSpeedSettings
from p828.engine.interface import Engine
from p828.engine.plain import PlainEngine
from p828.engine.sharded.engine import ShardedEngine
from p828.engine.sharded.mesh import shards_of
from p828.health.facts import Facts
from p828.inference.tasks.tasks import Tasks, open_all
from p828.interchange.fit import check_shapes
from p828.interchange.origin import Origin
from p828.model.costs import count_parameters
from p828.optim.schedule import learning_rate
from p828.runs import checkpoint, file_names
from p828.runs.checkpoint_content import rules_of
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from p828.runs.records import Recorder
from p828.runs.train_state import TrainState
from p828.system.device import check_room, make_deterministic, pick_device
from p828.train.checkpointing import Checkpointing
from p828.train.engine_choice import check_precision, with_fitting_stage
from p828.train.evaluation import Evaluator, check_prompts
from p828.train.fetch import Fetcher
from p828.train.health import HealthWatch
from p828.train.init_from import load_weights, origin_of, take_tokenizer
from p828.train.log.console import Console, say, waiting
from p828.train.log.log import Log
from p828.train.log.summary import banner, conclude, recorded_end, report_start
from p828.train.log.trackers import Trackers, open_trackers
from p828.train.log.usage import Usage
from p828.train.probes import Probes
from p828.train.resume import RunDirectory, open_run, resume
from p828.train.rollback import Rollback
from p828.train.signals import graceful_shutdown, interruptible
from p828.train.task_evaluation import TaskEvaluator
from p828.train.trainer import Trainer


def train(config: Config) -> None:
    """Train a run to its end, from its newest complete checkpoint if there is one.

    Raises ConfigError and DataError for wrong input, leaving no new run behind, but for a tokenizer that was trained;
    RunFailed when the run cannot go on, RunStopped when its own guard ends it, and RunPaused when it was asked to end.
    """
    with contextlib.ExitStack() as stack:
        asked, config = config, for_processes(config, launched().size)
        with waiting("waiting for the other ranks", say):
            ranks = stack.enter_context(joined(config))
        report = say if ranks.is_first else _nothing
        check_same_settings(asked, ranks)
        with ranks.raise_together():
            config = with_steps(config, ranks.size)
            validate(config)
        if ranks.size > 1 and is_left_to_p828(asked, ranks.size):
            config, line = with_fitting_stage(config, ranks, asked.sharded.stage_chosen_for)
            report(line)
        with ranks.raise_together():
            check_precision(config)
            settings = check_deepspeed(config, ranks) if config.engine == "deepspeed" else None
        if config.engine == "sharded":
            shards_of(config.sharded, ranks)  # which refuses hosts that differ
        config, newer = ranks.on_rank_0(lambda: pinned(config, _before(config)))
        _check_data(config, ranks, report)
        tasks = _open_tasks(config.evaluation, ranks, report)
        configure_torch(config)
        if config.engine == "plain":  # before hours are spent on a tokenizer; again once its size is known
            check_room(count_parameters(config.model).total, pick_device(config.train.device))
        outputs = _open_outputs(config, ranks, report, stack)
        inputs = _open_inputs(config, ranks, outputs, tasks)
        with inputs.loader:
            _run(inputs, outputs, ranks, settings, newer)


@dataclass
class _Outputs:
    """Where a run writes."""

    run: RunDirectory
    trackers: Trackers | None
    recorder: Recorder
    console: Console
    device: torch.device


@dataclass
class _Inputs:
    """What a run reads, and its configuration with the vocabulary that the tokenizer has."""

    config: Config
    tokenizer: Tokenizer
    rules: list[bool | None]
    """By which rule the run's checkpoint holds out text, of each source; empty for a new run."""
    validation: list[Batch]
    tasks: Tasks | None
    """As `TaskEvaluator.tasks`."""
    loader: Loader
    origin: Origin | None
    """The model that a new run starts from; None for a run that goes on, or starts from drawn weights."""


def _before(config: Config) -> Config | None:
    """The run's own configuration, for the commits of its data sets on the hub; None for a new run or other data."""
    path = config.run_dir / CONFIG_FILE
    is_on_hub = any(data.source == "hf" for data in config.data.sources) or config.data.validation.hub_name
    return load(str(path)) if is_on_hub and path.exists() else None


def _nothing(text: str) -> None:
    """In place of `say` on every rank but the first, which prints for all."""


def _check_data(config: Config, ranks: ProcessGroup, report: Callable[[str], None]) -> None:
    """End at a missing file or an empty validation set before anything is written."""
    with ranks.raise_together(), waiting(f"opening the data: {', '.join(config.data.source_names)}", report):
        for data in config.data.sources:
            if data.prepared:
                open_manifest(Path(data.prepared))
            else:
                open_training(data, config.train.seed, retry=Retry(report=report))
                if data in validation_sources(config.data):
                    next(open_validation(data, Retry(data.read_retries, report=report)))


def _open_tasks(evaluation: EvaluationConfig, ranks: ProcessGroup, report: Callable[[str], None]) -> Tasks | None:
    """The tasks, on rank 0, whose data may have to be fetched; None on the others. Raises ConfigError on all ranks."""
    opened: list[Tasks] = []

    def find() -> None:
        names, directory = evaluation.tasks, evaluation.tasks_path
        opened.append(interruptible(lambda: open_all(names, directory, is_quiet=True)))

    if evaluation.tasks:
        with waiting(f"reading the tasks: {', '.join(evaluation.tasks)}", report):
            ranks.on_rank_0(find)
    return opened[0] if opened else None


def configure_torch(config: Config) -> None:
    """Set what holds for all of PyTorch in this process: `train.deterministic`, and a warning less."""
    if config.train.deterministic:
        make_deterministic()
    # Advice to round float32 products to TF32; the router is to stay in float32.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def _open_outputs(
    config: Config, ranks: ProcessGroup, report: Callable[[str], None], stack: contextlib.ExitStack
) -> _Outputs:
    device, is_quiet = pick_device(config.train.device), not ranks.is_first
    with waiting(f"opening {config.run_dir}, and verifying its newest checkpoint if it has one", report):
        run = stack.enter_context(open_run(config, ranks))
    trackers = None if is_quiet else open_trackers(run.path, config, report)
    with waiting("opening the records", report):
        recorder = stack.enter_context(Recorder(run.path, is_quiet, trackers))
    first_step = 0 if run.newest is None else file_names.step_of(run.newest)
    console = Console(run.path, max(config.train.steps, first_step), first_step, is_quiet=is_quiet)
    return _Outputs(run, trackers, recorder, stack.enter_context(console), device)


def _open_inputs(config: Config, ranks: ProcessGroup, outputs: _Outputs, tasks: Tasks | None) -> _Inputs:
    run, console = outputs.run, outputs.console
    part = ranks.on_host()  # the ranks of a host compare the files of prepared data together
    origin = origin_of(config, ranks, console) if run.newest is None else None
    # The other ranks find it in the run's directory.
    ranks.on_rank_0(lambda: _make_tokenizer(config, run, origin, console))
    with ranks.raise_together():
        tokenizer = _tokenizer(config, console)
        config = run.with_vocabulary(config, tokenizer.vocab_size)
        if origin is not None:
            check_shapes(config, origin.config.model)
        if outputs.trackers is not None:
            outputs.trackers.update(config)
        check_prompts(config.evaluation, tokenizer, config.model.max_position_embeddings, _is_chat(config))
        rules: list[bool | None] = []
        if run.newest is not None:
            with checkpoint.opened(run.newest, names=()) as saved:
                rules = rules_of(saved)
        with console.waiting("reading the validation rows"):
            validation = interruptible(
                lambda: validation_batches(
                    config.data,
                    tokenizer,
                    config.model.mask_documents,
                    config.evaluation.rows,
                    config.train.micro_batch_size,
                    rules,
                    part,
                    console.event,
                )
            )
        is_pinned = outputs.device.type == "cuda"
        with console.waiting("opening the training data"):
            loader = open_loader(
                config.data,
                config.train,
                tokenizer,
                config.model.mask_documents,
                is_pinned,
                ranks.rank,
                ranks.size,
                report=console.event,
                part=part,
            )
    return _Inputs(config, tokenizer, rules, validation, tasks, loader, origin)


def _run(
    inputs: _Inputs, outputs: _Outputs, ranks: ProcessGroup, settings: DeepSpeedSettings | None, newer: list[str]
) -> None:
    """Build the loop and run it. `newer` are lines on hub data sets that have a newer commit than the run's."""
    config, tokenizer, loader, run, console = (
        inputs.config,
        inputs.tokenizer,
        inputs.loader,
        outputs.run,
        outputs.console,
    )
    with console.waiting("making the model"):
        engine = _engine(config, ranks, settings, outputs)
    if inputs.origin is not None:
        load_weights(config, inputs.origin, engine, console)
    trainer = _trainer(inputs, outputs, engine, ranks)
    changes: list[str] = []
    if run.newest is not None:
        with console.waiting(f"loading the checkpoint of step {file_names.step_of(run.newest)}"):
            trainer.state, lines = resume(run.newest, trainer.checkpointing)
            changes = [*run.changes, *lines]
    with ranks.raise_together():
        loader.start()
        # Without a step to come no checkpoint would have the changes, and the file would not be its settings.
        if ranks.is_first and not (run.changes and trainer.is_done()):
            run.write(config)
    ranks.on_rank_0(lambda: _introduce(inputs, trainer, settings, outputs.trackers))
    about_data = [*template_lines(config.data, tokenizer), *held_out_lines(config.data, inputs.rules), *newer]
    report_start(config, run, trainer, tokenizer, about_data, changes)
    run.keep()
    with recorded_end(trainer), graceful_shutdown(loader.cancel, console.event) as shutdown:
        trainer.run(shutdown)
    conclude(config, trainer, tokenizer)


def _trainer(inputs: _Inputs, outputs: _Outputs, engine: Engine, ranks: ProcessGroup) -> Trainer:
    config, tokenizer, loader, run = inputs.config, inputs.tokenizer, inputs.loader, outputs.run
    usage = Usage()
    log = Log(
        outputs.recorder, outputs.console, usage, config.model, config.data, config.train, engine.device, ranks.size
    )
    fingerprint, enclosed = tokenizer.fingerprint(), {TOKENIZER_FILE: tokenizer.to_json().encode()}
    if tokenizer.template is not None:
        enclosed[TOKENIZER_CONFIG_FILE] = config_json(tokenizer.template).encode()
    checkpointing = Checkpointing(
        run.path / CHECKPOINTS, config, run.versions, fingerprint, enclosed, engine, loader, log, usage, ranks
    )
    rollback = Rollback(config.rollback, checkpointing, loader, log, ranks)
    num_batches, num_sources = config.train.gradient_accumulation, len(config.data.source_names)
    return Trainer(
        config.train,
        config.evaluation,
        config.checkpoint,
        partial(
            learning_rate,
            steps=config.train.steps,
            peak=config.optimizer.learning_rate,
            schedule=config.schedule,
        ),
        TrainState(),
        engine,
        Fetcher(loader, num_batches, num_sources, usage, checkpointing, engine.device, ranks),
        log,
        Evaluator(
            config.evaluation,
            config.model.vocab_size,
            tokenizer,
            inputs.validation,
            engine,
            log,
            ranks,
            is_chat=_is_chat(config),
        ),
        _task_evaluator(inputs, engine, log, ranks),
        Probes(config, inputs.validation, engine, log, ranks),
        checkpointing,
        rollback,
        HealthWatch(config.health, Facts.of(config), log, rollback, config.data.source_names, tokenizer),
        usage,
        ranks,
    )


def _task_evaluator(inputs: _Inputs, engine: Engine, log: Log, ranks: ProcessGroup) -> TaskEvaluator | None:
    config = inputs.config
    if not config.evaluation.tasks:
        return None
    rows, every = config.train.micro_batch_size, config.evaluation.tasks_every
    return TaskEvaluator(inputs.tasks, every, rows, config.data.sequence_length, inputs.tokenizer, engine, log, ranks)


def _introduce(
    inputs: _Inputs, trainer: Trainer, settings: DeepSpeedSettings | None, trackers: Trackers | None
) -> None:
    """Say what run this is, and how much data there is for it, which is recorded."""
    config, origin, ranks, log, step = inputs.config, inputs.origin, trainer.ranks, trainer.log, trainer.state.step
    with log.console.waiting("estimating how much data there is"):
        found = amounts(config, inputs.tokenizer, ranks.size)
    log.console.block(config.name, banner(config, trainer.engine, ranks, settings, found, trackers, origin))
    if origin is not None:
        log.event("init_from", step, path=str(origin.path), step_there=origin.step, upcycled=config.train.upcycle)
    log.data_sources(
        step, [{"name": a.name, "tokens": a.tokens, "is_exact": a.is_exact, "epochs": a.epochs} for a in found]
    )
    for line in repeated(found):
        log.event("repeated_data", step, line)


def _engine(config: Config, ranks: ProcessGroup, settings: DeepSpeedSettings | None, outputs: _Outputs) -> Engine:
    """The engine. Records what the links between the ranks' devices cost, and reports slow ones."""
    parameters = count_parameters(config.model).total
    if config.engine == "plain":
        check_room(parameters, pick_device(config.train.device))
        return PlainEngine(config)
    engine = ShardedEngine(config, ranks) if settings is None else DeepSpeedEngine(config, ranks, settings)
    step = 0 if outputs.run.newest is None else file_names.step_of(outputs.run.newest)
    links = check_topology(ranks, engine.device, parameters, engine.reduced_dtype, engine.reductions)
    if links is not None:
        cost = {"all_reduce_seconds": links.seconds, "reductions": engine.reductions}
        outputs.recorder.write("event", step, event="links", kind_of_link=links.kind, **cost)
        for line in links.lines:
            outputs.recorder.write("event", step, event="slow_link", text=line)
            outputs.console.event(line)
    return engine


def _make_tokenizer(config: Config, run: RunDirectory, origin: Origin | None, console: Console) -> None:
    is_new = not (config.run_dir / TOKENIZER_FILE).exists()
    has_prepared = any(data.prepared for data in config.data.sources)
    if origin is not None:
        take_tokenizer(config, origin)
    tokenizer = _tokenizer(config, console)
    run.has_trained_tokenizer = is_new and config.tokenizer.name == "train" and not has_prepared and origin is None
    if is_new:
        documents = () if has_prepared else training_documents(config.data, config.train.seed, tokenizer.template)
        for line in remarks(config.tokenizer, tokenizer, documents):
            console.event(line)


def _tokenizer(config: Config, console: Console) -> Tokenizer:
    """The run's own if it has one, else as the configuration says."""
    path = config.run_dir / TOKENIZER_FILE
    if not path.exists() and (prepared := prepared_tokenizer(config.data, config.tokenizer)) is not None:
        prepared.save(path)
    is_trained = config.tokenizer.name == "train" and not path.exists()
    if is_trained:
        console.print(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens")
    with contextlib.nullcontext() if is_trained else console.waiting("loading the tokenizer"):
        tokenizer = tokenizer_of(config, path)
    if tokenizer.template is not None and not path.with_name(TOKENIZER_CONFIG_FILE).exists():
        save_template(path.parent, tokenizer.template)
    return tokenizer


def _is_chat(config: Config) -> bool:
    """Whether the run is on conversations alone, so that its prompts are messages."""
    return all(data.messages_field for data in config.data.sources)
