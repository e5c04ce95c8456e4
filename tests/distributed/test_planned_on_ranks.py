"""The bytes that each engine keeps on a rank of two, beside those that are planned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import WITHIN, torchrun, write_config

from p828.config import load, with_vocabulary
from p828.plan.setup import deepspeed_setup, sharded_setup
from p828.plan.state import training_state

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.long]


def test_every_stage_keeps_what_is_planned(tmp_path: Path) -> None:
    path = write_config(tmp_path, train={"dtype": "bfloat16"}, model={"use_qk_norm": True, "hidden_size": 33 * 8})
    path.write_text('engine = "deepspeed"\n' + path.read_text())
    script = str(Path(__file__).with_name("planned_state.py"))
    done = subprocess.run(
        [sys.executable, *torchrun(2, script), str(path)],
        capture_output=True, text=True, timeout=WITHIN, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    config = with_vocabulary(load(str(path)))
    assert len(found) == 7
    for name, kept in found.items():
        engine, stage = name.split()
        setup = (sharded_setup if engine == "sharded" else deepspeed_setup)(config, int(stage), 2)
        setup = setup._replace(has_bfloat16_moments=False)  # `auto` on a CPU
        assert training_state(config.model, config.optimizer, setup)._asdict() == kept, name
