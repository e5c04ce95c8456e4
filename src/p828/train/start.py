"""Builds a run's parts, in the order in which their inputs can be wrong, and sets the loop off."""

import warnings
from pathlib import Path

from p828.config import Config
from p828.config_checks import remarks
from p828.data.feed import open_loader, prepared_tokenizer, training_documents, validation_batches
from p828.data.manifest import open_manifest
from p828.data.retry import Retry
from p828.data.source import open_training, open_validation
from p828.data.tokenizer import Tokenizer, load_tokenizer
from p828.errors import UserError
from p828.model.flops import count_parameters
from p828.train import checkpoint
from p828.train.console import Console
from p828.train.deepspeed_settings import DeepSpeedSettings
from p828.train.device import lacks_bfloat16, make_deterministic, pick_device
from p828.train.engine import Engine, PlainEngine
from p828.train.engine_deepspeed import DeepSpeedEngine, check_deepspeed
from p828.train.metrics import Recorder
from p828.train.ranks import Ranks, joined
from p828.train.run_directory import TOKENIZER_FILE, open_run
from p828.train.stop import noted_signals
from p828.train.topology import check_topology
from p828.train.trainer import Trainer


def train(config: Config) -> None:
    """Train a run to its end, from its newest complete checkpoint if there is one.

    Raises UserError for wrong input, leaving no new run behind, and RunStopped when the run's own guard ends it.
    """
    with joined(config) as ranks:
        with ranks.agreed():
            settings = check_deepspeed(config, ranks) if config.engine == "deepspeed" else None
            # A missing file or an empty validation set ends here, before anything is written.
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
        _train(config, ranks, settings)


def _train(config: Config, ranks: Ranks, settings: DeepSpeedSettings | None) -> None:
    device, is_quiet = pick_device(config.train.device), not ranks.is_first
    with open_run(config, ranks) as run, Recorder(run.path, config, is_quiet) as recorder:
        first_step = 0 if run.newest is None else checkpoint.step_of(run.newest)
        with Console(run.path, config.train.steps, first_step, is_quiet=is_quiet) as console:
            ranks.first(lambda: _make_tokenizer(config, console))  # the others wait, and find it in the run's directory
            with ranks.agreed():
                tokenizer = _tokenizer(config, console)
                _check_prompts(config, tokenizer)
                validation = validation_batches(
                    config, tokenizer, config.evaluation.rows, config.train.micro_batch_size
                )
                opened = open_loader(
                    config, tokenizer, device.type == "cuda", ranks.rank, ranks.size, tell=console.event
                )
            with opened as loader:
                engine = _engine(config, ranks, settings, console)
                trainer = Trainer(config, run, tokenizer, loader, validation, engine, recorder, console, ranks)
                console.print(_describe(config, engine, ranks, settings))
                changes = [] if run.newest is None else [*run.changes, *trainer.resume(run.newest)]
                with ranks.agreed():
                    loader.start()
                run.keep()
                lines = [*run.damaged, *changes]
                if run.newest is not None:
                    lines.append(f"resumed from step {trainer.progress.step}")
                elif run.damaged:
                    lines.append("no checkpoint is left: the run begins again from step 0")
                for line in lines:
                    trainer.tell("resume", line)
                for line in remarks(config):
                    trainer.tell("remark", line)
                if config.train.dtype == "auto" and lacks_bfloat16(device):
                    trainer.tell("remark", "this GPU does not compute in bfloat16: the run is in float32")
                with noted_signals(loader.stop_waiting) as trainer.stop:
                    trainer.run()
                trainer.conclude()


def _engine(config: Config, ranks: Ranks, settings: DeepSpeedSettings | None, console: Console) -> Engine:
    """With a word on the links between the ranks' devices, if there is one."""
    if settings is None:
        return PlainEngine(config)
    engine, parameters = DeepSpeedEngine(config, ranks, settings), count_parameters(config.model).total
    for line in check_topology(ranks, engine.device, parameters, engine.reduced_dtype, engine.reductions):
        console.event(line)
    return engine


def _make_tokenizer(config: Config, console: Console) -> None:
    _tokenizer(config, console)


def _tokenizer(config: Config, console: Console) -> Tokenizer:
    """The run's own if it has one, else as the configuration says."""
    path = config.run_dir / TOKENIZER_FILE
    if not path.exists() and (prepared := prepared_tokenizer(config)) is not None:
        prepared.save(path)
    if config.tokenizer.name == "train" and not path.exists():
        console.print(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens")
    return load_tokenizer(config.tokenizer, lambda: training_documents(config), config.model.vocab_size, path)


def _describe(config: Config, engine: Engine, ranks: Ranks, settings: DeepSpeedSettings | None) -> str:
    device = str(engine.device) if ranks.size == 1 else f"{ranks.size} x {engine.device.type}"
    if settings is not None:
        device += f" through DeepSpeed, ZeRO stage {settings.stage},"
    parameters = count_parameters(config.model)
    return (
        f"{config.name}: {parameters.total / 1e6:.1f} M parameters, {parameters.active / 1e6:.1f} M active, "
        f"on {device} in {str(engine.dtype).removeprefix('torch.')}, "
        f"{config.tokens_per_step * ranks.size:,} tokens a step, {config.train.steps:,} steps"
    )


def _check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """A prompt too long for the model would otherwise end the run at its first evaluation."""
    context = config.model.max_position_embeddings
    for prompt in config.evaluation.prompts:
        length = len(tokenizer.encode(prompt))
        if length >= context:
            raise UserError(
                f"evaluation.prompts: {prompt[:40]!r} has {length} tokens: "
                f"fewer than model.max_position_embeddings = {context} are accepted"
            )
