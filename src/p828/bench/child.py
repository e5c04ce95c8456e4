"""The process that measures one system: `python -m p828.bench.child JOB RESULT`, both JSON files.

A process each, so that memory, compile caches and the first step's time are each system's own. It ends when its
standard input does, which is when the process that started it has ended, in whatever way.
"""

import json
import os
import sys
import threading
from pathlib import Path


def main() -> None:
    threading.Thread(target=_end_with_input, daemon=True).start()
    from p828.bench.measure import describe_machine, measure_system  # imports torch, which takes seconds

    job_path, result_path = map(Path, sys.argv[1:])
    job = json.loads(job_path.read_text(encoding="utf-8"))
    result = describe_machine(job["device"]) if job["kind"] == "machine" else measure_system(job)
    result_path.write_text(json.dumps(result), encoding="utf-8")


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
