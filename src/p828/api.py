"""p828 from Python: what `import p828` offers to a script or a notebook.

Each function calls what the commands call. They import PyTorch when they need it, so that a configuration is loaded at
once.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from p828.config import Config, load_given, validate, with_vocabulary
from p828.config.overrides import read_overrides
from p828.config.values import changed, shown
from p828.distributed.launcher import launched, report_once
from p828.errors import ConfigError, DataError, P828Error, RunFailed, RunPaused, RunStopped
from p828.train.settled import settled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from p828.data.batch import Batch
    from p828.data.loader import Loader
    from p828.data.tokenizer.chat_template import Messages
    from p828.data.tokenizer.tokenizer import Tokenizer
    from p828.engine.plain import PlainEngine
    from p828.inference.evaluate import Evaluation
    from p828.inference.load import LoadedModel
    from p828.interchange.export import Export
    from p828.interchange.gguf import GGUFExport
    from p828.interchange.origin import Origin
    from p828.model.transformer import Transformer

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "P828Error",
    "Run",
    "RunFailed",
    "RunPaused",
    "RunStopped",
    "batches",
    "build_engine",
    "build_model",
    "build_tokenizer",
    "load_config",
    "load_run",
    "loss",
    "train_run",
]


def load_config(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset, a .toml file or a run's directory, changed by overrides and validated.

    `overrides` are dotted keys, as `{"train.steps": 50, "data.files": ["book.txt"]}`, with values as TOML has them.
    They do what the flags of `p828 train` do: they imply kinds, old names are read with a warning on standard error,
    and a key that would change nothing is refused. Raises ConfigError, and DataError for damaged prepared data.
    """
    loaded = load_given(os.fspath(name_or_path))
    found = read_overrides(overrides or {}, loaded.given)
    report_once([*loaded.old_names, *found.old_names])
    return settled(changed(loaded.config, found.values), found.given, loaded, launched())


def train_run(config: Config) -> "Run":
    """Train a run in `config.run_dir` to its end, from its newest checkpoint if it has one, as `p828 train` does.

    It prints what the command prints, to `sys.stdout`; in a notebook, as to a pipe, in plain lines. All of it is in the
    run's log.txt, too, so `contextlib.redirect_stdout` may take it away. Called in the main thread, it takes SIGINT (a
    notebook's interrupt), SIGTERM and SIGHUP as the command does: the first one ends the run after its step, saved, and
    raises RunPaused; a second one ends the process.

    Raises ConfigError and DataError for wrong input, leaving no new run behind; RunFailed when the run cannot go on,
    and RunStopped when its own guard ends it. What was made of it is kept then, and calling again goes on.
    """
    from p828.train.log.console import say  # imports no torch

    if "torch" not in sys.modules:
        say(f"{config.name}: loading PyTorch")
    from p828.system.device import explain_out_of_memory
    from p828.train.build import train

    with explain_out_of_memory(config.name):
        train(config)
    return Run(config.run_dir, config.train.device)


def load_run(path: str | Path, device: str = "auto") -> "Run":
    """A trained run from its directory, with the model of its newest complete checkpoint; or from one checkpoint's.

    `device` is auto, cpu or cuda. A newer checkpoint that is damaged is told on standard error. Raises ConfigError,
    DataError for damage, and RunFailed where the files cannot be read.
    """
    run = Run(Path(path), device)
    _ = run.loaded
    return run


@dataclass(frozen=True)
class Run:
    """A run on disk: its records, and its model, which is loaded when it is first asked for and then kept."""

    path: Path
    """The run's directory, or a checkpoint's."""
    device: str = "auto"
    """Where its model goes: auto, cpu or cuda."""

    @cached_property
    def loaded(self) -> "LoadedModel":
        """The checkpoint: `model`, `tokenizer`, `config`, `step`, its `path`, and the `dtype` to compute in."""
        from p828.inference.load import load_model

        return load_model(self.path, self.device)

    @property
    def model(self) -> "Transformer":
        """In evaluation mode."""
        return self.loaded.model

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.loaded.tokenizer

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def step(self) -> int:
        """Optimizer updates that made the model."""
        return self.loaded.step

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the run has recorded so far in metrics.jsonl: each has a `kind`, as "step" or "eval", and a `step`.

        Raises ConfigError where it cannot be read, as beside a checkpoint that was taken out of its run.
        """
        from p828.runs import records
        from p828.runs.file_names import RECORDS_FILE

        path = Path(os.path.abspath(self.path))
        own, of_checkpoint = path / RECORDS_FILE, path.parent.parent / RECORDS_FILE
        return list(records.read(of_checkpoint if of_checkpoint.exists() and not own.exists() else own))

    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> list[str]:
        """The continuation of each prompt, without the prompt, as `p828 generate` gives it.

        `sampling` has fields of `p828.inference.sampling_config.SamplingConfig`, as `temperature`, `max_new_tokens`,
        `stop` and `seed`. A decoder is made for each call: many prompts are continued faster in one. Raises ConfigError
        for a setting that is unknown, of another type or out of range, and for a prompt that is no text or fills the
        model's context.
        """
        from p828.inference.generate import generate
        from p828.inference.sampling_config import sampling_config

        config = sampling_config(sampling)
        if not isinstance(prompts, str | Iterable):
            raise ConfigError(f"prompts = {shown(prompts)}: a text or a list of texts is accepted")
        loaded = self.loaded
        completions = generate(loaded.model, loaded.tokenizer, _several(prompts), config, dtype=loaded.dtype)
        return [completion.text for completion in completions]

    def answer(self, messages: "str | Messages", **sampling: Any) -> str:
        """What the assistant says next, to a user's message or in a conversation: a list of `role` and `content`.

        `sampling` is as in `generate`. Raises ConfigError as it does, and for a run not trained on conversations.
        """
        from p828.inference.answer import answer_one
        from p828.inference.sampling_config import sampling_config

        return answer_one(self.loaded, messages, sampling_config(sampling))

    def export(
        self, directory: str | Path, dtype: Literal["float32", "bfloat16"] = "float32", native_only: bool = False
    ) -> "Export":
        """Write the model for transformers, as `p828 export` does; `architecture`, `weights`, `bytes` and more of it.

        Raises ConfigError for a directory that has something in it, and with `native_only` for a model that needs code
        of its own; DataError for damage, and RunFailed when the directory cannot be written.
        """
        from p828.interchange.export import export_model

        return export_model(self.path, directory, dtype, native_only)

    def export_gguf(
        self, file: str | Path, dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    ) -> "GGUFExport":
        """Write model and tokenizer for llama.cpp, as `p828 export` does; `architecture`, `bytes` and more of it.

        Raises ConfigError for a file that is there, and for a model or tokenizer that llama.cpp does not have;
        DataError for damage, and for a number that float16 does not have; RunFailed when the file cannot be written.
        """
        from p828.interchange.gguf import export_gguf

        return export_gguf(self.path, Path(file), dtype)

    def evaluate(
        self, files: str | Path | Sequence[str | Path] = (), rows: int = 0, micro_batch_size: int = 0
    ) -> "Evaluation":
        """`loss`, `perplexity`, `bits_per_byte`, `tokens` and `bytes`, as `p828 evaluate` measures them.

        It measures the run's own validation text, or the given files. `rows` is how many rows; 0 takes the run's
        number, and every row of given files. `micro_batch_size` of them are put through the model at once; 0 takes the
        run's. Raises ConfigError where there is no such text, and DataError for text that is damaged.
        """
        from p828.errors import warn
        from p828.inference.evaluate import evaluate
        from p828.inference.measured_text import batches_of, measured_config

        values = {"data.files": tuple(map(str, _several(files))), "rows": rows, "micro_batch_size": micro_batch_size}
        given = {key: value for key, value in values.items() if value}
        config = measured_config(self.loaded, given)
        return evaluate(self.loaded.model, batches_of(config, self.loaded, given, warn), self.loaded.dtype)

    def measure_tasks(
        self, tasks: str | Sequence[str], limit: int | None = None, num_fewshot: int | None = None, tasks_path: str = ""
    ) -> dict[str, dict[str, float]]:
        """Each task's metrics, as `p828 evaluate --tasks` finds them.

        `limit` takes the first items of each task, `num_fewshot` solved examples before each question of lm-eval's
        tasks, and `tasks_path` is a directory of further ones. Raises ConfigError for a task that is unknown or whose
        data cannot be read, and RunFailed where lm-eval fails.
        """
        from p828.errors import warn
        from p828.inference.tasks.task_model import TaskModel
        from p828.inference.tasks.tasks import open_all

        opened = open_all(_several(tasks), tasks_path)
        return opened.measure(TaskModel.of(self.loaded, 0, warn), limit, num_fewshot)


def _several(values: Any) -> tuple[Any, ...]:
    """One text or path as the only one."""
    return (values,) if isinstance(values, str | os.PathLike) else tuple(values)


def build_tokenizer(config: Config) -> "Tokenizer":
    """The tokenizer that a new run would have: of its prepared data, trained on its text, or the one that is named.

    A run that starts from another model (`train.init_from`) has that model's. Nothing is written. Raises ConfigError,
    and DataError for damaged text.
    """
    from p828.data.build import prepared_tokenizer, tokenizer_of
    from p828.train.init_from import tokenizer_from

    validate(config)
    if (origin := _origin(config)) is not None:
        return tokenizer_from(config, origin)
    prepared = prepared_tokenizer(config.data, config.tokenizer)
    return prepared if prepared is not None else tokenizer_of(config)


def build_model(config: Config, tokenizer: "Tokenizer | None" = None) -> "Transformer":
    """The model with its initial weights, drawn or those of `train.init_from`, float32, on the device of the run.

    With `model.vocab_size = 0` the vocabulary is the tokenizer's. Raises ConfigError.
    """
    from p828.engine.microbatch import prepare_layers
    from p828.interchange.origin import opened_weights
    from p828.model.init import initial_model

    config, device = _buildable(config, tokenizer)
    model = initial_model(config.model, device, config.train.seed)
    prepare_layers(model, config.train, config.balance)
    if (origin := _origin(config)) is not None:
        with opened_weights(origin, config) as weights:
            model.load_state_dict(dict(weights))
    return model


def build_engine(config: Config, tokenizer: "Tokenizer | None" = None) -> "PlainEngine":
    """The model with gradients, optimizer and balance bias, on one device, as `p828 train` has it.

    A step is `engine.forward_backward(batch, num_targets)` for each micro-batch, where `num_targets` counts the targets
    of all of them, and then `engine.step(learning_rate)`, which gives what it found. `config.model` is as in
    `build_model`. Raises ConfigError, also for engine = "deepspeed".
    """
    from p828.engine.plain import PlainEngine
    from p828.interchange.origin import opened_weights

    if config.engine != "plain":
        raise ConfigError(f'engine = "{config.engine}": "plain" is accepted here; train_run trains with the other')
    config = _buildable(config, tokenizer)[0]
    engine = PlainEngine(config)
    if (origin := _origin(config)) is not None:
        with opened_weights(origin, config) as weights:
            engine.load_weights(weights)
    return engine


def _origin(config: Config) -> "Origin | None":
    """The model that a run with this configuration starts from, verified; None if it starts from drawn weights."""
    from p828.interchange.origin import find_origin, read_origin

    return read_origin(find_origin(Path(config.train.init_from))[0]) if config.train.init_from else None


def _buildable(config: Config, tokenizer: "Tokenizer | None") -> "tuple[Config, torch.device]":
    """The configuration with the tokenizer's vocabulary, and a device that has room for the model."""
    from p828.model.backend import check_widths
    from p828.model.costs import count_parameters
    from p828.system.device import check_room, pick_device, pick_dtype
    from p828.train.build import configure_torch

    validate(config)
    rows, ids = config.model.vocab_size, 0 if tokenizer is None else tokenizer.vocab_size
    if not rows and not ids:
        raise ConfigError("model.vocab_size = 0 is the tokenizer's vocabulary: give the tokenizer besides")
    if 0 < rows < ids:
        raise ConfigError(f"the tokenizer's vocabulary of {ids} exceeds model.vocab_size = {rows}")
    config = with_vocabulary(config, ids)
    device = pick_device(config.train.device)
    check_widths(config.model, device, pick_dtype(config.train.dtype, device))
    check_room(count_parameters(config.model).total, device)
    configure_torch(config)
    return config, device


def batches(config: Config, tokenizer: "Tokenizer") -> "Loader":
    """The training micro-batches of a run from its beginning, without end, made ahead in a thread.

    Use it in a `with`, which ends the thread. `next` gives a `p828.data.batch.Batch` on the host. Raises ConfigError
    and DataError; so does `next`.
    """
    from p828.data.loader import open_loader
    from p828.errors import warn
    from p828.system.device import pick_device

    validate(config)
    is_pinned = pick_device(config.train.device).type == "cuda"
    return open_loader(config.data, config.train, tokenizer, config.model.mask_documents, is_pinned, report=warn)


def loss(model: "Transformer", batch: "Batch", dtype: "torch.dtype | None" = None) -> "Tensor":
    """Mean cross-entropy of a batch, in nats per target: a float32 scalar to call `backward` on.

    The layers compute in `dtype`; without one in what `train.dtype = "auto"` gives on the model's device. The engine's
    loss is the same; its gradients also have the auxiliary losses of the section `balance`, if any is on.
    """
    import torch

    from p828.model.loss import IGNORE, LinearCrossEntropy
    from p828.system.device import pick_dtype

    device = model.head_weight.device
    dtype = pick_dtype("auto", device) if dtype is None else dtype
    batch = batch.to(device)
    valid_BS = batch.targets_BS != IGNORE
    output = model(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=dtype, valid_BS=valid_BS)
    scale = torch.tensor(1 / max(batch.num_targets, 1), dtype=torch.promote_types(dtype, torch.float32), device=device)
    hidden_TH, targets_T = output.hidden_BSH.flatten(0, 1), batch.targets_BS.flatten()
    mean: Tensor = LinearCrossEntropy.apply(hidden_TH, model.head_weight, targets_T, scale)
    return mean
