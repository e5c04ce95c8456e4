"""lm-eval: its own `hf` model on an export, and p828's adapter, give the same numbers at the same tasks."""

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from exported import save_model
from p828.cli.main import dispatch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError
from p828.inference.tasks.lm_eval_tasks import TasksFailed, as_lm, open_tasks, unknown_task
from p828.inference.tasks.task_model import TaskModel
from p828.interchange.export import export_model
from p828.model.transformer import Transformer
from tiny import tiny_model

QUESTIONS = [
    ("the cat sat on the", [" mat", " dog and the cat", " the", "\n"], 0),
    ("and the dog ", ["sat", "on the mat", "and", "the cat sat on"], 1),  # a space at the context's end
    ("", [" the cat", "the dog sat", "mat", " and"], 2),
    ("the mat 🙂", [" the 🙂", "🙂", "é cat", " dog"], 3),
    ("the cat and the dog sat on the mat " * 12 + "the", [" cat", " dog", " mat and the", " sat"], 1),  # too long
    ("the", ["re", "y are", "m", " cat"], 0),
]
TEXTS = ["the cat and the dog", "mat " * 150, "é 🙂 on the mat"]


def write_tasks(directory: Path) -> None:
    """Three tasks of lm-eval over local files: multiple choice, text, and greedy continuation."""
    directory.mkdir()
    documents = {
        "choices": [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS],
        "texts": [{"text": text} for text in TEXTS],
        "prompts": [{"prompt": q, "wanted": " the"} for q, _, _ in QUESTIONS[:2]],
    }
    for name, rows in documents.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
            "doc_to_target": "answer", "target_delimiter": "",
            "metric_list": [{"metric": metric, "aggregation": "mean"} for metric in ("acc", "acc_norm")],
        },
        "texts": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        },
        "prompts": {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{wanted}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, values in tasks.items():
        source = {"dataset_path": "json", "test_split": "test", "fewshot_split": "test"}
        kwargs = {"data_files": {"test": str(directory / f"{name}.jsonl")}, "cache_dir": str(directory / "cache")}
        task = {"task": f"p828_{name}", **source, "dataset_kwargs": kwargs, **values}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module", params=[False, True], ids=["glm4_moe", "p828"])
def model(request: pytest.FixtureRequest) -> Transformer:
    """One that is exported as transformers' own, and with sinks one that has code of its own."""
    return tiny_model(vocab_size=288, attention_sinks=request.param)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lm_eval") / "tasks"
    write_tasks(directory)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Transformer, byte_level: Tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("lm_eval_run") / "run", model, byte_level)


@pytest.fixture(scope="module")
def theirs(run: Path, tasks: Path) -> dict[str, Any]:
    """What lm-eval finds with its own model on the export, and each log-likelihood and text."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    export = export_model(run, run.parent / "export")
    return simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(export.directory),
            "dtype": "float32",
            "device": "cpu",
            "trust_remote_code": export.architecture.model_type == "p828",
        },
        tasks=["p828_choices", "p828_texts", "p828_prompts"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3,
        bootstrap_iters=1000,
    )


def responses(found: dict[str, Any], task: str) -> list[Any]:
    """Of each document, what the model answered to each request."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [[response[0] for response in sample["resps"]] for sample in samples]


def task_model(model: Transformer, tokenizer: Tokenizer, batch_tokens: int = 200) -> TaskModel:
    return TaskModel(model, tokenizer, torch.float32, batch_tokens, 2, lambda line: None)


def test_log_likelihoods_are_those_of_lm_evals_own_model(
    model: Transformer, byte_level: Tokenizer, theirs: dict[str, Any]
) -> None:
    pairs = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices]
    ours = task_model(model, byte_level).loglikelihoods(pairs)
    expected = [pair for document in responses(theirs, "p828_choices") for pair in document]
    assert [score.nats for score in ours] == pytest.approx([float(nats) for nats, _ in expected], abs=1e-4, rel=1e-5)
    assert [str(score.is_greedy) for score in ours] == [str(is_greedy) for _, is_greedy in expected]
    documents = task_model(model, byte_level).document_loglikelihoods(TEXTS)
    of_texts = [float(document[0]) for document in responses(theirs, "p828_texts")]
    assert documents == pytest.approx(of_texts, abs=1e-4, rel=1e-5)


def test_continuations_are_those_of_lm_evals_own_model(
    model: Transformer, byte_level: Tokenizer, theirs: dict[str, Any]
) -> None:
    prompts = [question for question, _, _ in QUESTIONS[:2]]
    ours = task_model(model, byte_level).continuations(prompts, {"until": ["\n"], "max_gen_toks": 8})
    assert ours == [document[0] for document in responses(theirs, "p828_prompts")]
    assert any(ours)


def test_the_command_finds_what_lm_eval_finds_on_the_export(
    run: Path, tasks: Path, tmp_path: Path, theirs: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    names = "p828_choices,cloze_english,p828_texts,p828_prompts"
    flags = ["--tasks", names, "--tasks-path", str(tasks), "--json", str(tmp_path / "found.json")]
    assert dispatch(["evaluate", str(run), "--device", "cpu", *flags]) == 0
    out, _ = capfd.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "checkpoint", "cloze_english", "p828_choices", "p828_texts", "p828_prompts"
    ]  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]
    for task in ("p828_choices", "p828_texts", "p828_prompts"):
        numbers = {k: v for k, v in theirs["results"][task].items() if "," in k and isinstance(v, float)}
        assert numbers
        for key, value in numbers.items():
            assert found[task][key.removesuffix(",none")] == pytest.approx(value, rel=1e-5, nan_ok=True), key
    assert found["p828_choices"]["items"] == len(QUESTIONS)
    assert 0 < found["p828_choices"]["acc"] < 1
    assert lines[2].startswith(f"p828_choices   acc {found['p828_choices']['acc']:.4g} ± ")


def test_examples_and_limit(run: Path, tasks: Path, tmp_path: Path) -> None:
    flags = ["--tasks", "p828_choices", "--tasks-path", str(tasks), "--json", str(tmp_path / "found.json")]
    assert dispatch(["evaluate", str(run), "--device", "cpu", *flags, "--limit", "2", "--num-fewshot", "1"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]["p828_choices"]
    assert (found["items"], found["num_fewshot"]) == (2, 1)


def test_a_task_that_takes_no_examples_is_said(
    model: Transformer, byte_level: Tokenizer, tasks: Path, tmp_path: Path
) -> None:
    values = {**yaml.safe_load((tasks / "choices.yaml").read_text()), "task": "bare", "num_fewshot": 0}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(values))
    lines: list[str] = []
    found = open_tasks(["bare"], str(tmp_path), is_quiet=True).measure(
        TaskModel(model, byte_level, torch.float32, 200, 2, lines.append), None, 3
    )
    assert found["bare"]["num_fewshot"] == 0
    assert lines == ["bare is measured without examples: its file says num_fewshot: 0"]


def test_random_states_and_the_environment_stay(model: Transformer, byte_level: Tokenizer, tasks: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), dict(os.environ)
    opened = open_tasks(["p828_choices"], str(tasks), is_quiet=True)
    first = opened.measure(task_model(model, byte_level), None, None)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), dict(os.environ)
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3]
    assert opened.measure(task_model(model, byte_level), None, None) == first, "tasks may be measured again"


@pytest.mark.parametrize(
    "name, expected",
    [("cloze_pyton", "did you mean cloze_python?"), ("close_english", "cloze_english?"), ("my task", "lm-eval ls")],
)
def test_a_name_that_lm_eval_cannot_have_is_answered_at_once(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # so that to ask lm-eval is another error
    with pytest.raises(ConfigError, match=rf"^tasks: no task '{name}' in lm-eval; .*{re.escape(expected)}"):
        open_tasks([name])


@pytest.mark.long  # reading all of lm-eval's tasks takes seconds
def test_an_unknown_name_is_looked_for_among_all_tasks(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task 'helaswag' in lm-eval, and none in .*did you mean hellaswag"):
        open_tasks(["helaswag"], str(tasks))


def test_an_unknown_name_is_answered_with_near_ones(tmp_path: Path) -> None:
    known = ["cloze_python", "hellaswag", "hellaswag_ta", "mmlu"]
    assert unknown_task("helaswag", known, "").endswith("in lm-eval; did you mean hellaswag, hellaswag_ta?")
    assert unknown_task("xyz", known, "").endswith("in lm-eval; `lm-eval ls tasks` lists them.")
    (tmp_path / "broken.yaml").write_text("task: mine\n  dataset: [")
    line = unknown_task("mine", known, str(tmp_path))
    assert f"none in {tmp_path} ({tmp_path}/broken.yaml is no task file: mapping values" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}, "tasks broken: cannot be read: .*nowhere"),
        ({"unsafe_code": True}, "broken executes what the model writes"),
        ({"test_split": "none"}, "tasks broken: cannot be read: "),
    ],
)
def test_a_task_that_cannot_be_read_is_answered_in_a_line(
    tasks: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    values = {**yaml.safe_load((tasks / "choices.yaml").read_text()), "task": "broken", **change}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=expected):
        open_tasks(["broken"], str(tmp_path), is_quiet=True)


def test_a_task_that_fails_at_work_is_answered_in_a_line(
    model: Transformer, byte_level: Tokenizer, tasks: Path, tmp_path: Path
) -> None:
    values = {**yaml.safe_load((tasks / "choices.yaml").read_text()), "task": "broken", "doc_to_choice": "{{1/0}}"}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises((TasksFailed, ConfigError), match="ZeroDivisionError"):
        open_tasks(["broken"], str(tmp_path), is_quiet=True).measure(task_model(model, byte_level), None, None)


def test_without_a_network_the_line_says_where_the_data_come_from(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set that is in no cache, with the hub switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    values = yaml.safe_load((tasks / "choices.yaml").read_text())
    values.pop("dataset_kwargs")
    (tmp_path / "far.yaml").write_text(yaml.safe_dump({**values, "task": "far", "dataset_path": "nobody/nothing"}))
    with pytest.raises(ConfigError, match=r"tasks far: cannot be read: .*\n.*Hugging Face hub"):
        open_tasks(["far"], str(tmp_path), is_quiet=True)


def test_requests_of_different_settings_are_answered_each_by_its_own(
    taught: Transformer, byte_level: Tokenizer
) -> None:
    from lm_eval.api.instance import Instance

    settings = [{"until": [" on"]}, {"until": [" mat"]}, {"until": [" on"]}]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=("The cat", given), idx=index)
        for index, given in enumerate(settings)
    ]
    found = as_lm(task_model(taught, byte_level)).generate_until(requests)
    assert found == [" 🙂 sat", " 🙂 sat on the", " 🙂 sat"]
