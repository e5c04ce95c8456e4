"""Tasks on several ranks: rank 0 asks them, and all ranks compute the answers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import Stage, cases, records_of, train, write_config

from p828.cli.main import dispatch

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{wanted}}}}"
generation_kwargs: {{until: ["x"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize("stage, ranks", cases([(1, 2), (3, 2), (3, 4), ("sharded-1", 2), ("sharded-3", 2)], short=[]))
def test_a_run_of_ranks_finds_the_numbers_of_one_process(
    tmp_path: Path, stage: Stage, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "ab" * n, "wanted": "y"}) + "\n" for n in range(1, 8)))
    (tmp_path / "letters.yaml").write_text(TASK.format(rows=rows, cache=tmp_path / "cache"))
    evaluation = {"every": 0, "tasks": ["cloze_python", "letters"], "tasks_every": 1, "tasks_path": str(tmp_path)}
    config = write_config(tmp_path, evaluation=evaluation)
    out = train(config, tmp_path / "runs" / "run", stage, ranks, "--train.steps", "2")
    lines = records_of(tmp_path / "runs" / "run", "tasks")
    assert [line["step"] for line in lines] == [1, 2]
    assert out.count("step 2: cloze_python: accuracy") == 1, "on rank 0 alone"
    flags = ["--tasks", "cloze_python,letters", "--tasks-path", str(tmp_path), "--json", str(tmp_path / "found.json")]
    assert dispatch(["evaluate", str(tmp_path / "runs" / "run"), "--device", "cpu", *flags]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert lines[-1]["results"]["cloze_python"] == pytest.approx(found["cloze_python"], abs=1e-5)
    assert lines[-1]["results"]["letters"] == pytest.approx(found["letters"], abs=1e-5)


ON_A_RANK = """
import json, os, sys
from contextlib import nullcontext
import torch
import torch.distributed as dist
from p828.config import TokenizerConfig
from p828.data.tokenizer.training import train_tokenizer
from p828.distributed.group import ProcessGroup
from p828.errors import P828Error, RunFailed
from p828.inference.tasks.tasks import Tasks, open_all
from p828.train.task_evaluation import SharedTaskModel
from tiny import tiny_model

class Failing(Tasks):
    def measure(self, model, limit=None, num_fewshot=None):
        model.score([])
        raise RunFailed("on rank 0")

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if size > 1:
    dist.init_process_group("gloo")
ranks = ProcessGroup(rank, size, dist.group.WORLD) if size > 1 else ProcessGroup()
tokenizer = train_tokenizer(TokenizerConfig(vocab_size=280), ["the cat and the dog sat on the mat " * 10])
weights = tiny_model(vocab_size=288)
model = SharedTaskModel(
    weights, tokenizer, torch.float32, 256, 2, lambda line: None, ranks, lambda: nullcontext(weights)
)
found = {"cloze": model.asked_by(open_all(["cloze_python"]) if rank == 0 else None)}

class Prompts(Tasks):
    def measure(self, model, limit=None, num_fewshot=None):
        return model.continuations(["the cat " * n for n in range(9)] + ["the cat "], {"max_gen_toks": 4})

found["texts"] = model.asked_by(Prompts((), None) if rank == 0 else None)
try:
    model.asked_by(Failing((), None) if rank == 0 else None)
except P828Error as error:
    found["error"] = str(error)
print("FOUND" + json.dumps(found))
if size > 1:
    dist.destroy_process_group()
"""


def found_on(size: int) -> list[dict[str, Any]]:
    """What each of several processes finds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ON_A_RANK],
            cwd=Path(__file__).parents[1], env={**os.environ, **common, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all("FOUND" in out for out, _ in outputs), outputs
    return [json.loads(out.partition("FOUND")[2]) for out, _ in outputs]


def test_ranks_share_the_work_and_the_errors() -> None:
    first, second = found_on(2)
    (alone,) = found_on(1)
    assert first["cloze"] == {"cloze_python": pytest.approx(alone["cloze"]["cloze_python"], abs=1e-5)}
    assert first["texts"] == alone["texts"]
    assert len(set(first["texts"])) > 3
    assert (second["cloze"], second["texts"]) == ({}, {})
    assert [found["error"] for found in (first, second, alone)] == ["on rank 0"] * 3
