"""Running the measuring process, reading what it found, and the file that is kept in."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from p828.errors import ConfigError

LAST_LINES = 6


def check_writable(path: Path) -> None:
    """Raises ConfigError now, and not after the first minutes of measuring."""
    if path.is_dir():
        raise ConfigError(f"--json {path}: is a directory; a file is accepted")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--json {path}: cannot be written: {path.parent} is no directory to write in")


class MeasurementFailed(Exception):
    """The measuring process ended without a result; the message is the last lines of what it said."""


def measure_apart(job: dict[str, Any]) -> dict[str, Any]:
    """What `p828.bench.child` finds for a job that has one result. Raises MeasurementFailed."""
    with closing(results_apart(job)) as results:
        (result,) = results
    return result


def results_apart(job: dict[str, Any]) -> Generator[dict[str, Any]]:
    """What `p828.bench.child` finds for a job, each result as soon as it is known. Raises MeasurementFailed at its end.

    Compiled code is kept in a directory of the process's own, unless TORCHINDUCTOR_CACHE_DIR names one. The process
    does not outlive this generator, however it ends.
    """
    with tempfile.TemporaryDirectory(prefix="p828-bench-") as name:
        place = Path(name)
        job_path, log_path = place / "job.json", place / "log.txt"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(place / "inductor"))
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, "-m", "p828.bench.child", str(job_path)]
        with (
            log_path.open("wb") as log,
            subprocess.Popen(
                command, env=os.environ | caches, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            ) as process,
        ):
            assert process.stdout is not None
            has_result = False
            try:
                for line in process.stdout:
                    has_result = True
                    yield json.loads(line)
                code = process.wait()
            finally:
                process.kill()
                process.wait()
        if code or not has_result:
            raise MeasurementFailed(_last_lines(log_path, code))


def _last_lines(log_path: Path, code: int) -> str:
    lines = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(line[:300] for line in lines[-LAST_LINES:]) or f"ended with code {code} and said nothing"
