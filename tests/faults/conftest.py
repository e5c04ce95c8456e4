"""What the machine under a run does wrong."""

import shutil
import subprocess
from pathlib import Path

import pytest
from shim import Shim


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
