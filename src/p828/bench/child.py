"""The process that measures one system: `python -m p828.bench.child JOB`, a JSON file; its results are JSON Lines.

A process each, so that memory, compile caches and the first step's time are each system's own. A result is written to
standard output as soon as it is known. The process ends when its standard input does, which is when the process that
started it has ended, in whatever way.
"""

import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def main() -> None:
    threading.Thread(target=_end_with_input, daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:
        os.dup2(2, 1)  # what libraries print is no result
        for result in _measured(Path(sys.argv[1])):
            print(json.dumps(result), file=results, flush=True)


def _measured(job_path: Path) -> Iterable[dict[str, Any]]:
    from p828.bench.generation.measure import describe_memory, measure_generation  # imports torch, which takes seconds
    from p828.bench.measure import describe_machine, measure_system

    job = json.loads(job_path.read_text(encoding="utf-8"))
    if job["kind"] == "generation":
        return measure_generation(job)
    if job["kind"] == "system":
        return [measure_system(job)]
    return [describe_memory(job["device"]) if job["kind"] == "memory" else describe_machine(job["device"])]


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
