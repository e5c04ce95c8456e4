"""A new run that starts from the weights of another model (`train.init_from`): its tokenizer, and its first weights."""

from pathlib import Path

from p828.config import Config
from p828.data.build import prepared_tokenizer
from p828.data.retry import Retry
from p828.data.tokenizer.of_run import load_tokenizer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.tokenizer_config import save_template, template_for
from p828.distributed.group import ProcessGroup
from p828.engine.interface import Engine
from p828.errors import ConfigError
from p828.interchange.origin import Origin, find_origin, opened_weights, read_origin
from p828.runs.file_names import TOKENIZER_FILE
from p828.train.log.console import Console


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
    """Write the origin's tokenizer into the run's directory, if it is not there, with its chat template unless one is
    given. Raises ConfigError for another tokenizer.
    """
    path = config.run_dir / TOKENIZER_FILE
    if path.exists():
        own = Tokenizer.from_file(path, config.tokenizer.eos_token)
        _check_same(own, origin, f"{path}: another tokenizer", "give another --name")
    else:
        check_tokenizer(config, origin)
        origin.tokenizer.save(path)
        if origin.tokenizer.template is not None and not config.tokenizer.chat_template:
            save_template(path.parent, origin.tokenizer.template)


def tokenizer_from(config: Config, origin: Origin) -> Tokenizer:
    """The origin's tokenizer as the run has it, which is not written: with a given chat template, or one for its data.

    Raises ConfigError for another tokenizer.
    """
    check_tokenizer(config, origin)
    tokenizer, settings = origin.tokenizer, config.tokenizer
    if tokenizer.template is None or settings.chat_template:
        tokenizer.template = template_for(settings, tokenizer.special_tokens, None, config.data.has_conversations)
    return tokenizer


def check_tokenizer(config: Config, origin: Origin) -> None:
    """Raises ConfigError if another tokenizer is given than the origin's, or the data was prepared with another one."""
    prepared = [data.prepared for data in config.data.sources if data.prepared]
    name = config.tokenizer.name
    if prepared:
        own = prepared_tokenizer(config.data, config.tokenizer)
        if own is None:  # made with the tokenizer of a file, which may be another one by now
            own = Tokenizer.from_file(Path(prepared[0]) / TOKENIZER_FILE, config.tokenizer.eos_token)
        _check_same(
            own,
            origin,
            f"data.prepared = {prepared[0]}: prepared with another tokenizer",
            f"p828 prepare makes it with the right one, given --train.init-from {config.train.init_from}",
        )
    elif name not in ("train", origin.config.tokenizer.name):
        _check_same(
            load_tokenizer(config.tokenizer, tuple, 0),
            origin,
            f"tokenizer.name = {name}: another tokenizer",
            f"p828 prepare takes it with --tokenizer.name {origin.path / TOKENIZER_FILE}",
        )


def load_weights(config: Config, origin: Origin, engine: Engine, console: Console) -> None:
    """Give the engine the weights that the run begins with. All ranks make the call, and each reads what it holds."""
    with console.waiting(f"loading the weights of {origin.path}"), opened_weights(origin, config) as weights:
        engine.load_weights(weights)


def _check_same(tokenizer: Tokenizer, origin: Origin, what: str, hint: str) -> None:
    """Raises ConfigError that begins with `what` and ends with `hint`."""
    there = origin.tokenizer
    if (tokenizer.fingerprint(), tokenizer.eos_id) != (there.fingerprint(), there.eos_id):
        raise ConfigError(f"{what} than that of {origin.path}, which comes along with its weights; {hint}")
