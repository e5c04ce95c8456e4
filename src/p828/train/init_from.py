"""A new run that starts from the weights of another model (`train.init_from`): its tokenizer, and its first weights."""

from pathlib import Path

from p828.config import Config
from p828.data.build import prepared_tokenizer
from p828.data.retry import Retry
from p828.data.tokenizer.of_run import load_tokenizer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.distributed.group import ProcessGroup
from p828.engine.interface import Engine
from p828.errors import ConfigError
from p828.interchange.origin import Origin, find_origin, opened_weights, read_origin
from p828.runs.file_names import TOKENIZER_FILE
from p828.train.console import Console


def origin_of(config: Config, ranks: ProcessGroup, console: Console) -> Origin | None:
    """The model that a new run starts from, verified by rank 0; None if it starts from drawn weights.

    Raises ConfigError, DataError and TransientReadError, on all ranks.
    """
    if not config.train.init_from:
        return None
    path, retry = Path(config.train.init_from), Retry(config.data.read_retries, report=console.event)
    with console.waiting(f"verifying {path}, which the run starts from"):
        found, notes = ranks.on_rank_0(lambda: find_origin(path, retry))
        for note in notes:
            console.event(note)
        with ranks.raise_together():
            return read_origin(found)


def take_tokenizer(config: Config, origin: Origin) -> None:
    """Write the origin's tokenizer into the run's directory, if it is not there. Raises ConfigError for another one."""
    path = config.run_dir / TOKENIZER_FILE
    own = Tokenizer.from_file(path, config.tokenizer.eos_token) if path.exists() else _given(config, origin)
    if own is not None and (own.fingerprint(), own.eos_id) != (origin.tokenizer.fingerprint(), origin.tokenizer.eos_id):
        prepared = [data.prepared for data in config.data.sources if data.prepared]
        what = path if path.exists() else prepared[0] if prepared else f"tokenizer.name = {config.tokenizer.name}"
        raise ConfigError(
            f"{what}: another tokenizer than that of train.init_from = {config.train.init_from}, which comes along "
            f"with its weights; p828 prepare takes it with --tokenizer.name {origin.path / TOKENIZER_FILE}"
        )
    if not path.exists():
        origin.tokenizer.save(path)


def load_weights(config: Config, origin: Origin, engine: Engine, console: Console) -> None:
    """Give the engine the weights that the run begins with. All ranks make the call, and each reads what it holds."""
    with console.waiting(f"loading the weights of {origin.path}"), opened_weights(origin, config) as weights:
        engine.load_weights(weights)


def _given(config: Config, origin: Origin) -> Tokenizer | None:
    """The tokenizer of prepared data, or of the file or the name that is given; None if it is the origin's."""
    prepared = prepared_tokenizer(config.data, config.tokenizer)
    if prepared is not None:
        return prepared
    name = config.tokenizer.name
    if name == "train" or name == origin.config.tokenizer.name:
        return None
    return load_tokenizer(config.tokenizer, tuple, 0)
