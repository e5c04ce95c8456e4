"""The model that a new run starts from (`train.init_from`): found, checked, and its weights opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from p828.config import Config
from p828.data.retry import NO_RETRY, Retry
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.tokenizer_config import read_template
from p828.errors import ConfigError, DataError
from p828.files import directory_near
from p828.inference.load import checked_model
from p828.interchange.fit import check_shapes
from p828.interchange.hub_directory import is_hub_directory, read_hub_directory
from p828.interchange.hub_weights import HubWeights
from p828.interchange.stored_tensors import StoredTensors
from p828.interchange.upcycling import UpcycledWeights
from p828.runs import checkpoint
from p828.runs.checkpoint_content import config_of
from p828.runs.file_names import CHECKPOINTS, STEP_NAME, step_of
from p828.runs.weights import PART, SavedWeights, Weights

ACCEPTED = "the directory of a run, of a checkpoint or of a model in the hub's layout is accepted"


@dataclass(frozen=True)
class Origin:
    path: Path
    """A checkpoint's directory, or one in the hub's layout."""
    config: Config
    """Of the run that made it; of a model from elsewhere the defaults, with its own model and tokenizer."""
    step: int
    """Optimizer updates that made it; 0 if that is not known."""
    tokenizer: Tokenizer


def find_origin(path: Path, retry: Retry = NO_RETRY) -> tuple[Path, list[str]]:
    """`Origin.path` of what a user names, verified; and a line for each newer checkpoint that is damaged.

    Raises ConfigError where there is none, DataError for damage, and TransientReadError.
    """
    _check_path(path)
    if is_hub_directory(path):
        return path, []
    found, notes = checkpoint.resolve_with_notes(path, retry)
    checkpoint.verify(found, [PART], retry)
    return found, notes


def read_origin(path: Path) -> Origin:
    """What `find_origin` has found, with all its parts compared with each other. Raises ConfigError and DataError."""
    if is_hub_directory(path):
        return read_hub_origin(path)
    with checkpoint.opened(path, names=[PART]) as saved:
        model = checked_model(saved)
    return Origin(path, model.config, saved.step, model.tokenizer)


def read_hub_origin(path: Path) -> Origin:
    """The same of a directory in the hub's layout."""
    hub = read_hub_directory(path)
    with _opened(path):  # which compares the weights
        pass
    eos_token = hub.config.tokenizer.eos_token
    tokenizer = Tokenizer.tried(Path(hub.config.tokenizer.name), eos_token)
    tokenizer.template = read_template(path, tokenizer.special_tokens, eos_token, is_foreign=True)
    if tokenizer.vocab_size > hub.config.model.vocab_size:
        raise ConfigError(
            f"{path}: its tokenizer's vocabulary of {tokenizer.vocab_size} exceeds "
            f"vocab_size = {hub.config.model.vocab_size}"
        )
    return Origin(path, hub.config, hub.step, tokenizer)


@contextmanager
def opened_weights(origin: Origin, config: Config | None = None) -> Iterator[Weights]:
    """Its weights; with `config` those that a run with this configuration begins with.

    Raises ConfigError if they are not of the configured model and do not become it. Errors of the block are raised as
    they are.
    """
    if config is not None:
        check_shapes(config, origin.config.model)
    with _opened(origin.path) as weights:
        if config is not None and config.train.upcycle:
            weights = UpcycledWeights(weights, origin.config.model, config.model, config.train.seed)
        yield weights


def settings_of(path: Path) -> Config:
    """`Origin.config` of what a user names, before anything is verified. Raises ConfigError and DataError."""
    _check_path(path)
    if is_hub_directory(path):
        return read_hub_directory(path).config
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    named = [entry for entry in directory.iterdir() if STEP_NAME.fullmatch(entry.name)] if directory.is_dir() else []
    for candidate in (path, *sorted(named, key=step_of, reverse=True)):
        try:
            with checkpoint.opened(candidate, names=()) as saved:
                return config_of(saved)
        except DataError:  # the run itself, or a damaged checkpoint
            continue
    with checkpoint.opened(find_origin(path)[0], names=()) as saved:  # says what was found instead
        return config_of(saved)


def _check_path(path: Path) -> None:
    if not path.is_dir():
        if path.exists():
            raise ConfigError(f"train.init_from = {path}: is a file; {ACCEPTED}")
        raise ConfigError(f"train.init_from = {path}: no such directory; {directory_near(path) or ACCEPTED}")


@contextmanager
def _opened(path: Path) -> Iterator[Weights]:
    if is_hub_directory(path):
        hub = read_hub_directory(path)
        with StoredTensors(path) as stored:
            yield HubWeights(stored, hub.config.model, hub.pieces)
    else:
        with checkpoint.opened(path, names=[PART]) as saved:
            yield SavedWeights(saved.tensors)
