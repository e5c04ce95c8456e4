"""A file that tests of DeepSpeed's settings write."""

from pathlib import Path

import pytest


@pytest.fixture
def ds(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"
