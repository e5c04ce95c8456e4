"""Tasks on several ranks: rank 0 asks them, and all ranks compute the answers."""

import json
from pathlib import Path

import pytest
from launch import cases, records_of, train, write_config

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


@pytest.mark.parametrize("stage, ranks", cases([(1, 2), (3, 2), (3, 4)], short=[(3, 2)]))
def test_the_numbers_are_those_of_one_process(
    tmp_path: Path, stage: int, ranks: int, capsys: pytest.CaptureFixture[str]
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
