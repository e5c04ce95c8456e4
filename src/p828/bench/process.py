"""Running the measuring process and reading what it found."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAST_LINES = 6


class MeasurementFailed(Exception):
    """The measuring process ended without a result; the message is the last lines of what it said."""


def measure_apart(job: dict[str, Any]) -> dict[str, Any]:
    """What `p828.bench.child` finds for a job. Raises MeasurementFailed.

    Compiled code is kept in a directory of the process's own, unless TORCHINDUCTOR_CACHE_DIR names one. The process
    does not outlive this call, however it ends.
    """
    with tempfile.TemporaryDirectory(prefix="p828-bench-") as name:
        place = Path(name)
        job_path, result_path, log_path = place / "job.json", place / "result.json", place / "log.txt"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(place / "inductor"))
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, "-m", "p828.bench.child", str(job_path), str(result_path)]
        with (
            log_path.open("wb") as log,
            subprocess.Popen(
                command, env=os.environ | caches, stdin=subprocess.PIPE, stdout=log, stderr=log
            ) as process,
        ):
            try:
                code = process.wait()
            finally:
                process.kill()
                process.wait()
        if code == 0 and result_path.exists():
            return dict(json.loads(result_path.read_text(encoding="utf-8")))
        raise MeasurementFailed(_last_lines(log_path, code))


def _last_lines(log_path: Path, code: int) -> str:
    lines = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(line[:300] for line in lines[-LAST_LINES:]) or f"ended with code {code} and said nothing"
