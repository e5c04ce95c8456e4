"""How long `p828 runs` takes over many runs, and `p828 compare` and `p828 batch` over many steps; processor seconds.

    python benchmarks/looking_at_runs.py [--runs 2000] [--steps 500000]

The runs are copies of one that an earlier version left, with its third record again and again.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from p828.runs.listing import list_runs
from p828.runs.side_by_side import side_by_side
from p828.runs.step_batch import documents_of_step

OLD = Path(__file__).parents[1] / "tests" / "data_of_old_versions"
STEPS_EACH = 3000  # of the many runs


def records(steps: int) -> str:
    record = json.loads((OLD / "runs" / "whole-tensors" / "metrics.jsonl").read_text().splitlines()[2])
    lines = ({**record, "step": step, "tokens": 128 * step} for step in range(1, steps + 1))
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def make_runs(directory: Path, count: int) -> None:
    text = records(STEPS_EACH)
    for number in range(count):
        run = directory / f"run{number:05}"
        shutil.copytree(OLD / "runs" / "whole-tensors", run)
        (run / "metrics.jsonl").write_text(text)


def timed(what: str, work: Callable[[], object]) -> None:
    began = time.process_time()
    work()
    print(f"{what:<60} {time.process_time() - began:6.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=500_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(shutil.copytree(OLD, Path(place) / "old"))
        many = Path(place) / "many"
        many.mkdir()
        make_runs(many, given.runs)
        timed(f"list {given.runs:,} runs of {STEPS_EACH:,} steps", lambda: list_runs(many))
        big = Path("runs", "whole-tensors")
        (big / "metrics.jsonl").write_text(records(given.steps))
        timed(f"compare two runs of {given.steps:,} steps", lambda: side_by_side(big, big))
        timed(f"the batch of step 7 among {given.steps:,}", lambda: documents_of_step(big, 7))


if __name__ == "__main__":
    main()
