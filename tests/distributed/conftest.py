"""Runs that several tests look at or go on with, each made once."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from launch import Run, Stage, train, train_and_kill, write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def whole(config: Path) -> Run:
    """A run's directory after all of its steps, undisturbed; to be read only."""

    @cache
    def trained(stage: Stage, ranks: int) -> Path:
        run = config.parent / "runs" / f"whole-{stage}-{ranks}"
        train(config, run, stage, ranks)
        return run

    return trained


@pytest.fixture(scope="session")
def killed(config: Path) -> Run:
    """A run's directory after a `kill -9` soon after its step 9; to be read only."""

    @cache
    def trained(stage: Stage, ranks: int) -> Path:
        run = config.parent / "runs" / f"killed-{stage}-{ranks}"
        train_and_kill(config, run, stage, ranks, 9)
        return run

    return trained


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a run, to go on with."""
    return lambda run: Path(shutil.copytree(run, tmp_path / "runs" / run.name))
