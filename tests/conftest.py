"""What all tests share."""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

from shim import Shim

# Nothing is asserted about time: examples may be slow on a machine that does other things, too.
hypothesis.settings.register_profile("p828", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("p828")

# The products here are too small to share between threads, and pytest-xdist has a process for every core.
torch.set_num_threads(1)


REMOTE_CODE = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """transformers would copy the code of the exports that tests load into the user's cache, and run it from there.

    It reads the variable when it is imported, which test modules do before any fixture runs.
    """
    config.stash[REMOTE_CODE] = tempfile.TemporaryDirectory(prefix="remote_code_")
    os.environ["HF_MODULES_CACHE"] = config.stash[REMOTE_CODE].name


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[REMOTE_CODE].cleanup()


@pytest.fixture(scope="session", autouse=True)
def _heeds_signals() -> None:
    """The processes that are tested are to get signals that a shell's background or nohup has these tests ignore."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; without one the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def shim(shim_library: Path, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """Loads `shim.c` into processes started from now on, with `SHIM_NAME = value` for each given name."""

    def set_up(**settings: object) -> None:
        monkeypatch.setenv("LD_PRELOAD", str(shim_library))
        for name, value in settings.items():
            monkeypatch.setenv(f"SHIM_{name.upper()}", str(value))

    return set_up
