"""Models and batches that the memory does not take: a line or two, with what to change."""

import resource
from pathlib import Path

import pytest

from p828.cli.main import dispatch
from runs import p828, write_toml

ADDRESS_SPACE = 3 * 2**30  # bytes: enough for PyTorch and a tiny run


def test_a_model_that_cannot_be_trained_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(tmp_path, model={"n_routed_experts": 10**9})
    assert dispatch(["train", str(path), "--runs-dir", str(tmp_path / "runs")]) == 2
    answer = capsys.readouterr().err
    assert "parameters takes more than" in answer
    assert "GB are free on this machine" in answer
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_step_that_does_not_fit(tmp_path: Path) -> None:
    sizes = {"steps": 2, "micro_batch_size": 1024, "gradient_accumulation": 1}
    evaluation = {"every": 0, "rows": 1, "prompts": []}
    model = {"moe_intermediate_size": 8192}  # activations of 4 GB
    path = write_toml(tmp_path, model=model, train=sizes, evaluation=evaluation, schedule={"warmup_steps": 0})
    limits = (ADDRESS_SPACE, ADDRESS_SPACE)
    code, out, err = p828(
        "train", str(path), cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits)
    )
    assert code == 1, out + err
    assert "p828: step 1: out of memory: can't allocate memory" in err
    assert "Lower train.micro_batch_size" in err
    assert "Traceback" not in err
