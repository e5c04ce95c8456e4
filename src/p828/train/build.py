"""Builds a run's parts, in the order in which their inputs can be wrong, and sets the loop off."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

from p828.config import Config, load, rules, validate, with_steps
from p828.data.amount import amounts, repeated
from p828.data.build import held_out_lines, open_loader, prepared_tokenizer, training_documents, validation_batches
from p828.data.retry import Retry
from p828.data.text.documents import open_training, open_validation
from p828.data.text.held_out import trained_on_too
from p828.data.text.hub import pinned
from p828.data.tokenizer import Tokenizer, load_tokenizer, remarks
from p828.data.tokens.format import open_manifest
from p828.distributed.group import ProcessGroup, joined
from p828.distributed.links import check_topology
from p828.engine.deepspeed.engine import DeepSpeedEngine, check_deepspeed
from p828.engine.deepspeed.settings import DeepSpeedSettings
from p828.engine.plain import Engine, PlainEngine
from p828.errors import ConfigError
from p828.model.costs import count_parameters, unused_vocabulary
from p828.runs import checkpoint
from p828.runs.checkpoint_content import rules_of
from p828.runs.layout import CONFIG_FILE, TOKENIZER_FILE, step_of
from p828.runs.records import Recorder
from p828.system.device import check_room, lacks_bfloat16, make_deterministic, pick_device
from p828.train.banner import entries
from p828.train.conclusion import conclude
from p828.train.console import Console, say, waiting
from p828.train.evaluation import Evaluations
from p828.train.resume import open_run
from p828.train.signals import graceful_shutdown
from p828.train.trainer import Trainer
from p828.train.wandb import WandbMirror, open_mirror


def train(config: Config) -> None:
    """Train a run to its end, from its newest complete checkpoint if there is one.

    Raises ConfigError for wrong input, leaving no new run behind, and RunStopped when the run's own guard ends it.
    """
    with contextlib.ExitStack() as stack:
        with waiting("waiting for the other ranks", say):
            ranks = stack.enter_context(joined(config))
        tell = say if ranks.is_first else _nothing
        with ranks.raise_together():
            config = with_steps(config, ranks.size)
            validate(config)
            settings = check_deepspeed(config, ranks) if config.engine == "deepspeed" else None
        config, newer = ranks.on_rank_0(lambda: pinned(config, _before(config)))
        # A missing file or an empty validation set ends here, before anything is written.
        with ranks.raise_together(), waiting(f"opening the data: {', '.join(config.data.source_names)}", tell):
            for data in config.data.sources:
                if data.prepared:
                    open_manifest(Path(data.prepared))
                else:
                    open_training(data, config.train.seed)
                    next(open_validation(data, Retry(data.read_retries)))
        if config.train.deterministic:
            make_deterministic()
        # Advice to round float32 products to TF32; the router is to stay in float32.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        _train(config, ranks, settings, newer, tell)


def _before(config: Config) -> Config | None:
    """The run's own configuration, for the commits of its data sets on the hub; None for a new run or other data."""
    path = config.run_dir / CONFIG_FILE
    is_on_hub = any(data.source == "hf" for data in config.data.sources) or config.data.validation.hub_name
    return load(str(path)) if is_on_hub and path.exists() else None


def _train(
    config: Config,
    ranks: ProcessGroup,
    settings: DeepSpeedSettings | None,
    newer: list[str],
    tell: Callable[[str], None],
) -> None:
    """`newer` are lines on hub data sets that have a newer commit than the run's."""
    device, is_quiet = pick_device(config.train.device), not ranks.is_first
    with contextlib.ExitStack() as stack:
        with waiting(f"opening {config.run_dir}, and verifying its newest checkpoint if it has one", tell):
            run = stack.enter_context(open_run(config, ranks))
        with waiting("starting Weights & Biases" if config.wandb.mode != "off" else "opening the records", tell):
            mirror = None if is_quiet else open_mirror(run.path, config)
            recorder = stack.enter_context(Recorder(run.path, is_quiet, mirror))
        first_step = 0 if run.newest is None else step_of(run.newest)
        with Console(run.path, max(config.train.steps, first_step), first_step, is_quiet=is_quiet) as console:
            part = ranks.on_host()  # they compare the files of prepared data together
            ranks.on_rank_0(
                lambda: _make_tokenizer(config, console)
            )  # the others wait, and find it in the run's directory
            with ranks.raise_together():
                tokenizer = _tokenizer(config, console)
                config = run.settled(config, tokenizer.vocab_size)
                if mirror is not None:
                    mirror.update(config)
                _check_prompts(config, tokenizer)
                rules: list[bool | None] = []
                if run.newest is not None:
                    with checkpoint.opened(run.newest, names=()) as saved:
                        rules = rules_of(saved)
                with console.waiting("reading the validation rows"):
                    validation = validation_batches(
                        config,
                        tokenizer,
                        config.evaluation.rows,
                        config.train.micro_batch_size,
                        rules,
                        part,
                        console.event,
                    )
                with console.waiting("opening the training data"):
                    opened = open_loader(
                        config, tokenizer, device.type == "cuda", ranks.rank, ranks.size, tell=console.event, part=part
                    )
            with opened as loader:
                with console.waiting("making the model"):
                    engine = _engine(config, ranks, settings, console)
                evaluations = Evaluations(config, tokenizer, validation, engine, recorder, console, ranks)
                trainer = Trainer(config, run, tokenizer, loader, evaluations, engine, recorder, console, ranks)
                changes: list[str] = []
                if run.newest is not None:
                    with console.waiting(f"loading the checkpoint of step {first_step}"):
                        changes = [*run.changes, *trainer.resume(run.newest)]
                with ranks.raise_together():
                    loader.start()
                    if ranks.is_first:
                        run.write(config)
                ranks.on_rank_0(lambda: _introduce(trainer, settings, mirror))
                _tell_how_it_begins(trainer, [*held_out_lines(config, rules), *newer], changes)
                run.keep()
                with graceful_shutdown(loader.cancel, console.event) as trainer.stop:
                    trainer.run()
                conclude(trainer)


def _nothing_left(trainer: Trainer) -> list[str]:
    """A line where a run that is resumed has been trained for as long as it shall be."""
    train = trainer.config.train
    if trainer.progress.step >= train.steps:
        longer = f"train.tokens = {train.tokens:g}" if train.tokens else f"train.steps = {train.steps:,}"
    elif trainer.is_out_of_time():
        longer = f"train.hours = {train.hours:g}"
    else:
        return []
    return [f"nothing is left to train with {longer}: a larger number trains the run longer"]


def _nothing(text: str) -> None:
    """In place of `say`, where rank 0 says it."""


def _introduce(trainer: Trainer, settings: DeepSpeedSettings | None, mirror: WandbMirror | None) -> None:
    """Say what run this is, and how much data there is for it, which is recorded."""
    config, ranks, console, recorder = trainer.config, trainer.ranks, trainer.console, trainer.recorder
    with console.waiting("estimating how much data there is"):
        found = amounts(config, trainer.tokenizer, ranks.size)
    console.block(config.name, entries(config, trainer.engine, ranks, settings, found, mirror))
    sources = [{"name": a.name, "tokens": a.tokens, "is_exact": a.is_exact, "epochs": a.epochs} for a in found]
    recorder.write("data", trainer.progress.step, sources=sources)
    for line in repeated(found):
        trainer.tell("repeated_data", line)


def _tell_how_it_begins(trainer: Trainer, about_data: list[str], changes: list[str]) -> None:
    """`changes` are lines on what differs from the checkpoint that the run goes on from."""
    config, run, console = trainer.config, trainer.directory, trainer.console
    for line in about_data:
        console.print(line)
    if run.newest is None and (line := unused_vocabulary(config.model, trainer.tokenizer.vocab_size)):
        console.event(line)
    lines = [*run.damaged, *changes]
    if run.newest is not None:
        lines += [f"resumed from step {trainer.progress.step}", *_nothing_left(trainer)]
    for line in lines:
        trainer.tell("resume", line)
    read = [data for data in config.data.sources if not data.prepared]
    for line in (*rules.remarks(config), *(line for data in read for line in trained_on_too(data))):
        trainer.tell("remark", line)
    if config.train.dtype == "auto" and lacks_bfloat16(trainer.engine.device):
        trainer.tell("remark", "this GPU does not compute in bfloat16: the run is in float32")


def _engine(config: Config, ranks: ProcessGroup, settings: DeepSpeedSettings | None, console: Console) -> Engine:
    """With a word on the links between the ranks' devices, if there is one."""
    parameters = count_parameters(config.model).total
    if settings is None:
        check_room(parameters, pick_device(config.train.device))
        return PlainEngine(config)
    engine = DeepSpeedEngine(config, ranks, settings)
    for line in check_topology(ranks, engine.device, parameters, engine.reduced_dtype, engine.reductions):
        console.event(line)
    return engine


def _make_tokenizer(config: Config, console: Console) -> None:
    is_new = not (config.run_dir / TOKENIZER_FILE).exists()
    tokenizer = _tokenizer(config, console)
    if is_new:
        has_text = not any(data.prepared for data in config.data.sources)
        for line in remarks(config.tokenizer, tokenizer, training_documents(config) if has_text else ()):
            console.event(line)


def _tokenizer(config: Config, console: Console) -> Tokenizer:
    """The run's own if it has one, else as the configuration says."""
    path = config.run_dir / TOKENIZER_FILE
    if not path.exists() and (prepared := prepared_tokenizer(config)) is not None:
        prepared.save(path)
    is_trained = config.tokenizer.name == "train" and not path.exists()
    if is_trained:
        console.print(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens")
    with contextlib.nullcontext() if is_trained else console.waiting("loading the tokenizer"):
        return load_tokenizer(config.tokenizer, lambda: training_documents(config), config.model.vocab_size, path)


def _check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """A prompt too long for the model would otherwise end the run at its first evaluation."""
    context = config.model.max_position_embeddings
    for prompt in config.evaluation.prompts:
        length = len(tokenizer.encode(prompt))
        if length >= context:
            raise ConfigError(
                f"evaluation.prompts: {prompt[:40]!r} has {length} tokens: "
                f"fewer than model.max_position_embeddings = {context} are accepted"
            )
