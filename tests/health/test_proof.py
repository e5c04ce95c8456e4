"""Injected faults are named, and healthy runs raise no alarm: a few here, all with `make test-health`."""

import os
from pathlib import Path

import pytest
from cases import base, config_of, joined
from corpus import write_corpus
from healthy import HEALTHY
from judge import Verdict, judged
from missed import MISSED
from proof import prove
from proof_runs import ProofRun, proof_runs
from table import WARNINGS_IN

from p828.api import train_run

SHORT = {"train": {"steps": 40}, "schedule": {"warmup_steps": 10}, "evaluation": {"every": 20}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), megabytes=1, is_prepared=False)


def verdict_of(run: ProofRun, corpus: Path, directory: Path) -> Verdict:
    """A short form of the run, in this process."""
    settings = joined(base(corpus), run.changes(corpus), SHORT)
    with run.case.inject(run.strength_value):
        train_run(config_of(settings, directory, run.name, run.seed))
    return judged(run, directory)


@pytest.mark.parametrize("name", ["balance-bias-wrong-sign-1", "wrong-denominator-sum-of-means-0"])
def test_a_fault_is_named(corpus: Path, tmp_path: Path, name: str) -> None:
    verdict = verdict_of(next(run for run in proof_runs() if run.name == name), corpus, tmp_path)
    assert verdict.is_right, verdict.afterwards
    assert verdict.found_live is not None


def test_a_healthy_run_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    verdict = verdict_of(ProofRun(HEALTHY[0], 0, 0), corpus, tmp_path)
    assert not [finding for finding in (*verdict.afterwards, *verdict.live) if finding.severity != "note"]


@pytest.mark.long
def test_all(tmp_path: Path) -> None:
    """Prints a line a run."""
    verdicts = prove(proof_runs(), tmp_path, jobs=os.cpu_count())
    healthy = [verdict for verdict in verdicts if verdict.run.is_healthy]
    missed = {verdict.run.name for verdict in verdicts if not verdict.run.is_healthy and not verdict.is_right}
    assert missed <= MISSED.keys()
    assert all(verdict.is_clean for verdict in healthy)
    assert WARNINGS_IN * sum(len(verdict.warnings) for verdict in healthy) <= len(healthy)
