"""The names of a run's files and directories, of its checkpoints and of their files."""

import re
from pathlib import Path

from p828.config import RUN_FILE

# In a run's directory:
CONFIG_FILE = RUN_FILE
TOKENIZER_FILE = "tokenizer.json"
"""Also in every checkpoint, so that one can be used by itself."""
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
"""Beside the tokenizer where it has a chat template, which is in it."""
CHECKPOINTS = "checkpoints"
RECORDS_FILE = "metrics.jsonl"
DAMAGED_RECORDS_FILE = "metrics.damaged"
"""Lines of `RECORDS_FILE` that were no records."""
LOG_FILE = "log.txt"
HANG_FILE = "hang.txt"
"""Where every rank was when none of them made progress."""
WANDB_ID_FILE = "wandb_id"
TRACKIO_ID_FILE = "trackio_id"
TRIAL_DIRECTORY = ".trial"
"""In which a start tries out what the file system can do."""

# In the directory of checkpoints; S is the name of a step's checkpoint:
STEP_NAME = re.compile(r"step_(\d{8,})")
QUARANTINED = "damaged_"
"""Before S: a checkpoint that was found damaged."""
SAVING, REPLACED, DELETED = "tmp", "replaced", "old"
"""Behind S, as `.S.tmp`: one that is being written, replaced by another of its step, or deleted."""

# In a checkpoint, besides the tensors' files, whose names `runs.tensors` makes:
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"


def name_of(step: int) -> str:
    """The name of a step's checkpoint directory."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(path.name.removeprefix("step_"))


def beside(path: Path, ending: str) -> Path:
    """Where a checkpoint lies while it is being written (`SAVING`), replaced (`REPLACED`) or deleted (`DELETED`)."""
    return path.with_name(f".{path.name}.{ending}")
