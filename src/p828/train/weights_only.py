"""A model from elsewhere as a run: its directory, with a checkpoint that holds weights and no optimizer's state."""

import dataclasses
from functools import partial
from pathlib import Path

import torch

from p828.config.values import to_dict
from p828.data.tokenizer.tokenizer_config import config_json, save_template
from p828.errors import RunFailed
from p828.files import new_directory
from p828.interchange.origin import Origin, opened_weights
from p828.runs.file_names import CHECKPOINTS, CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from p828.runs.tensors import Unread
from p828.runs.train_state import TrainState
from p828.runs.weights import PART
from p828.train.checkpoint_writer import save
from p828.train.resume import versions, write_config


def write_run(origin: Origin, name: str, runs_dir: str) -> Path:
    """Write the run `runs_dir/name`, whole or not at all, and return its directory.

    The weights are read and written tensor by tensor. Raises ConfigError where there is something already, DataError
    for weights that cannot be read, and RunFailed where the file system refuses.
    """
    config = dataclasses.replace(origin.config, name=name, runs_dir=runs_dir)
    state = {
        "progress": dataclasses.asdict(TrainState(step=origin.step)),
        "data": {},
        "config": to_dict(config),
        "versions": versions(),
        "tokenizer": origin.tokenizer.fingerprint(),
        "ranks": 1,
        "seconds": 0.0,
    }
    template = origin.tokenizer.template
    enclosed = {TOKENIZER_FILE: origin.tokenizer.to_json().encode()}
    if template is not None:
        enclosed[TOKENIZER_CONFIG_FILE] = config_json(template).encode()
    try:
        with new_directory(config.run_dir) as directory, opened_weights(origin) as weights:
            write_config(directory / CONFIG_FILE, config, versions())
            origin.tokenizer.save(directory / TOKENIZER_FILE)
            if template is not None:
                save_template(directory, template)
            tensors = {
                key: Unread(torch.empty(shape, device="meta"), partial(weights.__getitem__, key))
                for key, shape in weights.shapes.items()
            }
            save(directory / CHECKPOINTS, origin.step, {PART: tensors}, state, enclosed=enclosed)
    except OSError as error:
        raise RunFailed(f"{config.run_dir}: cannot be written: {error.strerror or error}") from None
    return config.run_dir
