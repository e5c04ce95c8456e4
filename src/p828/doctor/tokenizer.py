"""The tokenizer that a configuration asks for: whether it can be had, fits the model, and gives text back."""

import os
from dataclasses import replace
from pathlib import Path

from p828.config import Config
from p828.data.build import prepared_tokenizer, tokenizer_of
from p828.data.tokenizer.of_run import load_tokenizer
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.doctor.check import Check
from p828.errors import P828Error
from p828.interchange.origin import find_origin, read_origin
from p828.runs.file_names import TOKENIZER_FILE
from p828.train.init_from import tokenizer_from

NAME = "tokenizer"
TRIAL_MEGABYTES = 2  # of text that a tokenizer is trained on here; a run takes tokenizer.training_megabytes
OTHER = 'tokenizer.name accepts "train", the path of a tokenizer.json, or a name on the hub'
TEXT = "it is trained on the run's text: see what is said of the data"


def check_tokenizer(config: Config) -> tuple[Tokenizer | None, Check]:
    """The run's tokenizer, None where it cannot be had, and what was found. Nothing is written."""
    try:
        tokenizer, where = _tokenizer(config)
    except P828Error as error:
        first, _, rest = str(error).partition("\n")
        return None, Check(NAME, "failure", first, rest or (TEXT if config.tokenizer.name == "train" else OTHER))
    text = f"{where}: {tokenizer.vocab_size:,} ids"
    rows = config.model.vocab_size
    if 0 < rows < tokenizer.vocab_size:
        return None, Check(
            NAME,
            "failure",
            f"{text}, more than model.vocab_size = {rows:,}",
            "leave model.vocab_size 0, which follows it",
        )
    if rows > 1.1 * max(tokenizer.vocab_size, config.tokenizer.vocab_size):
        return tokenizer, Check(
            NAME, "warning", f"{text} of model.vocab_size = {rows:,}: the other rows are never used",
            "leave model.vocab_size 0, which follows the tokenizer",
        )  # fmt: skip
    return tokenizer, Check(NAME, "ok", text)


def _tokenizer(config: Config) -> tuple[Tokenizer, str]:
    """As `p828 train` takes it, but one that is to be trained is trained on little text; and where it is from."""
    saved = config.run_dir / TOKENIZER_FILE
    if os.path.exists(saved):
        return tokenizer_of(config, saved), f"of the run {config.run_dir}"
    if config.train.init_from:
        origin = read_origin(find_origin(Path(config.train.init_from))[0])
        return tokenizer_from(config, origin), f"of {config.train.init_from}"
    if (prepared := prepared_tokenizer(config.data, config.tokenizer)) is not None:
        return prepared, "of the prepared data"
    if config.tokenizer.name != "train":
        is_chat = config.data.has_conversations
        return load_tokenizer(config.tokenizer, tuple, config.model.vocab_size, None, is_chat), config.tokenizer.name
    megabytes = min(config.tokenizer.training_megabytes, TRIAL_MEGABYTES)
    trial = replace(config, tokenizer=replace(config.tokenizer, training_megabytes=megabytes))
    return tokenizer_of(trial), f"trained here on up to {megabytes} MB of the run's text"
