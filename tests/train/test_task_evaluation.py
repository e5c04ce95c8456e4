"""Tasks during training: when they are measured, what is recorded of them, and that they change nothing else."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from p828.cli.main import dispatch
from p828.config import from_dict
from p828.engine.plain import PlainEngine
from p828.runs import records
from p828.verify.kill_resume import shortened
from runs import write_toml
from same_run import assert_same_run, comparable_records


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_task(directory: Path, **changes: Any) -> None:
    """A task of lm-eval over a local file, with examples that are drawn at random."""
    directory.mkdir()
    rows = [{"question": f"ab cd {i}", "choices": [" ab", " cd ef", " gh", " ij"], "answer": i % 4} for i in range(8)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(directory / "rows.jsonl")}, "cache_dir": str(directory / "cache")}
    task = {
        "task": "letters", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
        "fewshot_split": "test", "num_fewshot": 1, "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}], **changes,
    }  # fmt: skip
    (directory / "letters.yaml").write_text(yaml.safe_dump(task))


def config_with_tasks(here: Path, *names: str, steps: int = 12, **evaluation: Any) -> str:
    """Dropout draws from the global random state."""
    values = {"tasks": names, "tasks_every": 6, **evaluation}
    return str(write_toml(here, model={"dropout": 0.1}, train={"steps": steps}, evaluation=values))


def of_tasks(run: Path) -> list[dict[str, Any]]:
    return [line for line in records.read(run / "metrics.jsonl") if line["kind"] == "tasks"]


def test_a_run_with_tasks_is_the_run_without_them(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights, random states and all other records are the same; and a resumed run measures again what it repeats."""
    write_task(here / "tasks")
    toml = config_with_tasks(here, "cloze_python", "letters", tasks_path=str(here / "tasks"))
    assert dispatch(["train", toml, "--name", "with"]) == 0
    said = capfd.readouterr()
    run = here / "runs" / "with"
    found = of_tasks(run)
    assert [line["step"] for line in found] == [6, 12]
    assert found[0]["results"].keys() == {"cloze_python", "letters"}
    assert found[0]["results"]["cloze_python"]["items"] == 100
    assert {"acc", "acc_stderr", "items", "num_fewshot"} == found[0]["results"]["letters"].keys()
    assert f"step 12: letters: acc {found[-1]['results']['letters']['acc']:.4g}" in said.out
    assert "step 6: cloze_python: accuracy" in said.out
    assert said.err == "", "nothing of lm-eval"

    assert dispatch(["train", str(write_toml(here, model={"dropout": 0.1})), "--name", "without"]) == 0
    assert not of_tasks(here / "runs" / "without")
    shutil.copytree(run, here / "runs" / "bare")
    kept = [line for line in records.read(run / "metrics.jsonl") if line["kind"] != "tasks"]
    (here / "runs" / "bare" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_run(here / "runs" / "bare", here / "runs" / "without", step=12)

    resumed = here / "runs" / "resumed"
    shutil.copytree(run, resumed)
    oldest, *others = sorted((resumed / "checkpoints").glob("step_*"))
    assert 6 < int(oldest.name[5:]) < 12
    for newer in others:
        shutil.rmtree(newer)
    toml = config_with_tasks(here, "cloze_python", "letters", tasks_path=str(here / "tasks"))
    assert dispatch(["train", toml, "--name", "resumed"]) == 0
    assert_same_run(run, resumed, step=12)
    assert len([record for record in comparable_records(resumed) if record[0] == "tasks"]) == 2


def test_the_numbers_are_those_of_the_command(here: Path) -> None:
    assert dispatch(["train", config_with_tasks(here, "cloze_english", steps=3, tasks_every=0)]) == 0
    (line,) = of_tasks(here / "runs" / "tiny")
    assert line["step"] == 3, "0: at the end only"
    assert dispatch(["evaluate", "runs/tiny", "--tasks", "cloze_english", "--json", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())["tasks"]["cloze_english"]
    assert found == pytest.approx(line["results"]["cloze_english"], abs=1e-6)


def test_a_task_that_fails_and_a_diverged_model_are_events(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(here / "tasks", doc_to_target="{{answer}}", process_results="!function nowhere.nothing")
    (here / "tasks" / "nowhere.py").write_text("def nothing(doc, results):\n    raise KeyError('lost')\n")
    text = (
        (here / "tasks" / "letters.yaml")
        .read_text()
        .replace("'!function nowhere.nothing'", "!function nowhere.nothing")
    )
    (here / "tasks" / "letters.yaml").write_text(text)
    toml = config_with_tasks(here, "letters", steps=3, tasks_path=str(here / "tasks"), tasks_every=0)
    assert dispatch(["train", toml]) == 0
    assert "step 3: the tasks are not measured: lm-eval fails: KeyError: 'lost'" in capsys.readouterr().out

    step = PlainEngine.step

    def ruined(self: PlainEngine, *arguments: Any) -> Any:
        result = step(self, *arguments)
        with torch.no_grad():
            self.model.head_weight.fill_(math.nan)
        return result

    monkeypatch.setattr(PlainEngine, "step", ruined)
    toml = config_with_tasks(here, "cloze_python", tasks_every=1, prompts=[])
    assert dispatch(["train", toml, "--name", "ruined"]) == 1
    assert "step 1: the tasks are not measured: cloze_python: the model's log-likelihoods" in capsys.readouterr().out


@pytest.mark.parametrize(
    "evaluation, expected",
    [
        ({"tasks_every": 5}, "evaluation.tasks_every = 5: accepted with evaluation.tasks"),
        ({"tasks_path": "x"}, "evaluation.tasks_path = 'x': accepted with evaluation.tasks"),
        ({"tasks": ["letters"], "tasks_path": "nowhere"}, "tasks_path = 'nowhere': no such directory"),
        ({"tasks": ["cloze_python"], "tasks_every": -1}, "evaluation.tasks_every = -1"),
        ({"tasks": ["cloze_python", "cloze_python"]}, "tasks: cloze_python is given twice"),
    ],
)
def test_wrong_tasks_end_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], evaluation: dict[str, Any], expected: str
) -> None:
    assert dispatch(["train", str(write_toml(here, evaluation=evaluation))]) == 2
    assert expected in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_proof_measures_tasks_too(tmp_path: Path) -> None:
    """`p828 prove-resume` compares records of the kinds that are repeated."""
    config = from_dict({"name": "x", "evaluation": {"tasks": ["cloze_python"], "tasks_every": 5000}}, "x")
    assert shortened(config, tmp_path).evaluation.tasks_every == 20
    assert "tasks" in records.REPEATED_KINDS
