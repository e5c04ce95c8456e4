"""DeepSpeed's settings of a run, with a file of DeepSpeed's own or without."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from p828 import config
from p828.config import Config
from p828.engine.deepspeed.settings import deepspeed_settings
from p828.errors import ConfigError

RUN = config.load("60m")
BATCHES = "train.micro_batch_size x train.gradient_accumulation x ranks = 8 x 16 x 2 = 256"
ADAMW = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}


def run(**own: Any) -> Config:
    """The 60m preset with its [deepspeed] changed."""
    return dataclasses.replace(RUN, deepspeed=dataclasses.replace(RUN.deepspeed, **own))


def through_deepspeed(**own: Any) -> Config:
    return dataclasses.replace(run(**own), engine="deepspeed")


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def settings_of(path: Path, values: dict[str, Any], dtype: str = "bfloat16", **own: Any) -> dict[str, Any]:
    """What becomes of a file with these values, on two ranks."""
    path.write_text(json.dumps(values))
    return deepspeed_settings(run(config=str(path), **own), dtype, 2).values


def complaint(path: Path, values: dict[str, Any], dtype: str = "bfloat16", **own: Any) -> str:
    """What is said about a file with these values, checked to be a line that names the file."""
    with pytest.raises(ConfigError) as error:
        settings_of(path, values, dtype, **own)
    return line_about(path, error)


def line_about(path: Path, error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    assert str(path) in message
    return message.replace(str(path), path.name)
