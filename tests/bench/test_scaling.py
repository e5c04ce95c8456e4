"""The benchmark of several processes, on a CPU; and what docs/distributed.md says of a step's collective operations."""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from p828.config import load
from p828.model.costs import count_parameters, parameters_by_part
from runs import write_toml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from scaling import Failed, run_within

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
ACCUMULATION, FLOAT32 = 2, 4


def scaling(path: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    result = path.with_suffix(".json")
    command = [sys.executable, str(SCRIPT), "--shape", str(path), "--device", "cpu", "--steps", "1", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(result)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(result.read_text())


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in range(3)), 3])
def test_what_two_ranks_pass_to_collective_operations(tmp_path: Path, stage: int) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    path = write_toml(tmp_path, deepspeed={"config": str(tmp_path / "ds.json")})
    path.write_text('engine = "deepspeed"\n' + path.read_text())
    size = FLOAT32 * count_parameters(load(str(path)).model).total
    shown, (result,) = scaling(path, "--systems", f"deepspeed-{stage}", "--gpus", "2")
    assert f"| deepspeed-{stage} | 2 |" in shown
    passed = result["passed_bytes"]
    reduced, gathered = {
        0: ({"all_reduce": size}, 0),
        1: ({"reduce": size}, size),
        2: ({"reduce": ACCUMULATION * size}, size),
        # A layer stays between forward and backward pass, as the model is far below stage3_max_live_parameters.
        3: ({"reduce_scatter_tensor": ACCUMULATION * size}, ACCUMULATION * size),
    }[stage]
    small = 0.05 * size  # loads, norms, and what fills up to equal shares
    for name, expected in {**reduced, "all_gather_into_tensor": gathered}.items():
        assert passed.get(name, 0) == pytest.approx(expected, abs=small), name
    assert sum(passed.values()) == pytest.approx(sum(reduced.values()) + gathered, abs=2 * small)


@pytest.mark.long
def test_what_the_sharded_engine_passes_to_collective_operations(tmp_path: Path) -> None:
    """On two ranks, at all stages, by the command. `test_sharded_ranks.py` has the same to the byte."""
    layers, buffers = 5, 2
    path = write_toml(tmp_path, model={"num_hidden_layers": layers})
    parts = parameters_by_part(load(str(path)).model)
    vocabulary = FLOAT32 * (parts.embedding + parts.head)
    layer = FLOAT32 * (parts.attention + parts.routed_experts + parts.shared_experts) / layers
    whole = vocabulary + layers * layer
    systems = [f"sharded-{stage}" for stage in (1, 2, 3)]
    shown, results = scaling(path, "--systems", "plain", *systems, "--gpus", "2")
    assert [(one["system"], one["gpus"]) for one in results] == [("plain", 1), ("plain", 2), *((s, 2) for s in systems)]
    assert "| plain | 2 |" in shown
    assert results[1]["seconds"] == pytest.approx(statistics.harmonic_mean(results[1]["own_seconds"]))
    assert len(results[1]["own_seconds"]) == 2
    exchanged = {"all_to_all": ACCUMULATION * layers * layer, "reduce_scatter": vocabulary}
    gathered = ACCUMULATION * (vocabulary + 2 * (layers - buffers) * layer) + buffers * layer
    expected = {
        "sharded-1": {"reduce_scatter": whole, "all_gather": whole},
        "sharded-2": {**exchanged, "all_gather": whole},
        "sharded-3": {**exchanged, "all_gather": gathered},
    }
    for result in results[2:]:
        passed = result["passed_bytes"]
        found = {
            name: sum(n for key, n in passed.items() if key.startswith(name))
            for name in ("all_to_all", "reduce_scatter", "all_gather")
        }
        for name, amount in expected[result["system"]].items():
            assert found[name] == pytest.approx(amount, rel=0.02), (result["system"], name)
        # Norms, routers, loads and what fills up to equal shards are little.
        assert sum(passed.values()) == pytest.approx(sum(found.values()), rel=0.05)
        assert {name for name, amount in found.items() if amount} == expected[result["system"]].keys()


def test_processes_that_fail_or_hang_end_a_row_and_say_why(tmp_path: Path) -> None:
    """One that prints more than a pipe holds hides none of them, and what a hanging one started ends with it."""
    number = tmp_path / "number"
    programs = [
        f"import subprocess, sys; open({str(number)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)); "
        "print('begun', flush=True); sys.stdin.read()",
        "print('the reason'); raise SystemExit(3)",
        "print('x' * 100_000); raise SystemExit(4)",
    ]
    commands = [["sh", "-c", 'sleep 600 | "$@"', "sh", sys.executable, "-c", programs[0]]]
    commands += [[sys.executable, "-c", program] for program in programs[1:]]
    with pytest.raises(Failed) as failed:
        run_within(10, commands, [dict(os.environ)] * 3)
    said = str(failed.value)
    for expected in (
        "process 0, not done in 10 s:\nbegun",
        "process 1, exit code 3:\nthe reason",
        "process 2, exit code 4",
    ):
        assert expected in said
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(int(number.read_text())).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)  # between two looks at it


def test_gpus_that_are_not_there(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "quickstart", "--gpus", "1", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "error: --gpus 1 1000: " in done.stderr
    assert " are there" in done.stderr
