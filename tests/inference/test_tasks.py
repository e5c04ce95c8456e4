"""p828's own tasks, their intervals, and `p828 evaluate --tasks` with them."""

import ast
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_run import save_run

import p828
from p828.cli.main import dispatch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError, NotFinite
from p828.inference.sampling_config import SamplingConfig
from p828.inference.tasks import cloze
from p828.inference.tasks.interval import fraction_interval, mean_interval
from p828.inference.tasks.own_names import OWN_NAMES
from p828.inference.tasks.task_model import TaskModel, sampling_of
from p828.inference.tasks.tasks import open_all, shown_metrics
from p828.model.transformer import Transformer
from tiny import tiny_model


def task_model(model: Transformer, tokenizer: Tokenizer, batch_tokens: int = 512) -> TaskModel:
    return TaskModel(model, tokenizer, torch.float32, batch_tokens, 4, lambda line: None)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(vocab_size=288)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_items_are_complete_and_without_a_pattern(name: str) -> None:
    items = cloze.read_items(name)
    assert len(items) == 100
    assert len({item.context for item in items}) == 100
    for item in items:
        assert len(set(item.endings)) == cloze.ENDINGS
        assert all((ending and ending.isprintable()) or "\n" in ending for ending in item.endings)
        assert item.context == item.context.rstrip(" ")
    assert Counter(item.answer for item in items) == dict.fromkeys(range(cloze.ENDINGS), 25)
    # Length tells nothing: per byte or not, the right ending is neither mostly the shortest nor the longest.
    for choose in (min, max):
        found = [choose(range(4), key=lambda i, item=item: len(item.endings[i])) == item.answer for item in items]
        assert 0.1 < np.mean(found) < 0.4


def test_right_endings_of_python_are_python() -> None:
    for item in cloze.read_items("cloze_python"):
        code = item.context + item.endings[item.answer]
        indented = [f"\n{'    ' * depth}pass" for depth in range(5)]
        tails = ["", "\nclass X: pass", "\n    x: int", "\n    pass\nexcept E:\n    pass", *indented]
        assert any(is_python(code + tail) for tail in tails), code


def is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


@torch.no_grad()
def test_cloze_is_the_likeliest_ending_per_byte(model: Transformer, byte_level: Tokenizer) -> None:
    """Beside the log-softmax of every text by itself."""
    items = cloze.read_items("cloze_python")[:20]
    right, margins = [], []
    for item in items:
        per_byte = []
        for ending in item.endings:
            ids = byte_level.encode(item.context + ending)[-65:]
            logits_SV = model.logits(model(torch.tensor([ids[:-1]])).hidden_BSH[0]).double()
            nats_S = logits_SV.log_softmax(1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            per_byte.append(nats_S[-len(byte_level.encode(ending)) :].sum().item() / len(ending.encode()))
        best_wrong = max(value for index, value in enumerate(per_byte) if index != item.answer)
        margins.append(per_byte[item.answer] - best_wrong)
        right.append(margins[-1] > 0)
    found = cloze.measure("cloze_python", task_model(model, byte_level), limit=20)
    assert found.accuracy == np.mean(right)
    assert 0 < found.accuracy < 1
    assert found.margin == pytest.approx(np.mean(margins), abs=1e-4)
    assert found.items == 20
    assert (found.accuracy_low, found.accuracy_high) == mean_interval([float(is_right) for is_right in right])


def test_tokens_over_the_border_are_scored_with_every_ending(byte_level: Tokenizer) -> None:
    """A tokenizer may join the context's last letter with an ending's first one; all endings begin alike then."""
    model, joined = tiny_model(vocab_size=288), task_model(tiny_model(vocab_size=288), byte_level)
    context, endings = "the cat sat on t", ["he", "xq"]
    assert len(byte_level.encode(context + "he")) < len(byte_level.encode(context)) + len(byte_level.encode("he"))
    (found,) = joined.ending_loglikelihoods([(context, endings)])
    texts = [byte_level.encode(context + ending) for ending in endings]
    shared = next(n for n, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1])
    for nats, ids in zip(found, texts, strict=True):
        logits_SV = model.logits(model(torch.tensor([ids[:-1]])).hidden_BSH[0]).double()
        nats_S = logits_SV.log_softmax(1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert nats == pytest.approx(nats_S[shared - 1 :].sum().item(), abs=1e-3)


def test_a_diverged_model_is_said(byte_level: Tokenizer) -> None:
    model = tiny_model(vocab_size=288)
    model.head_weight.data.fill_(math.nan)
    with pytest.raises(NotFinite, match="no finite numbers"):
        cloze.measure("cloze_english", task_model(model, byte_level), limit=2)


def test_the_interval_is_the_binomial_one() -> None:
    """Resampling n values of which a fraction p is 1 draws from Binomial(n, p) / n."""
    n, ones = 100, 30
    low, high = mean_interval([1.0] * ones + [0.0] * (n - ones))
    cumulative = np.cumsum([math.comb(n, k) * 0.3**k * 0.7 ** (n - k) for k in range(n + 1)])
    expected = [int(np.searchsorted(cumulative, tail)) / n for tail in (0.025, 0.975)]
    # of 10,000 resamples the quantile is off by some 0.0016 / density(0.01 a step): a step at most
    assert [low, high] == pytest.approx(expected, abs=0.0101)
    assert mean_interval([1.0] * 5) == (1.0, 1.0)
    assert mean_interval([0.0, 2.5, 7.0]) == mean_interval([0.0, 2.5, 7.0]), "the same at every call"


@pytest.mark.parametrize("count", [1, 5, 100])
def test_the_interval_of_equal_answers_is_wilsons(count: int) -> None:
    """The fractions from which the found one is 1.96 standard deviations away, those of the fractions themselves."""
    fraction_F = np.linspace(0, 1, 1_000_001)
    for value in (False, True):
        is_within_F = np.abs(value - fraction_F) <= 1.959964 * np.sqrt(fraction_F * (1 - fraction_F) / count)
        within = fraction_F[is_within_F]
        assert fraction_interval([value] * count) == pytest.approx((within.min(), within.max()), abs=2e-6)
    values = [True] * 3 + [False] * 4
    assert fraction_interval(values) == mean_interval(values)


def test_one_item_is_one() -> None:
    shown = {"accuracy": 1.0, "accuracy_low": 0.2, "accuracy_high": 1.0, "margin": 0.1, "items": 1}
    assert shown_metrics(shown).endswith(" 1 item")
    assert shown_metrics({"acc": 0.5, "items": 1}) == "acc 0.5, 1 item"


def test_continuations_end_at_stop_strings_and_begin_as_generate_does(
    taught: Transformer, byte_level: Tokenizer
) -> None:
    model = task_model(taught, byte_level)
    whole, short = model.continuations(["", "The cat"], {"until": ["\n\n"], "max_gen_toks": 40})
    assert whole == "The cat 🙂 sat on the mat, and so did the dog."
    assert whole == "The cat" + short
    assert model.continuations(["The cat"], {"until": " mat"}) == [" 🙂 sat on the"]
    assert model.continuations(["The cat"], {"until": [" dog", " on"], "do_sample": False}) == [" 🙂 sat"]
    long = "the dog " * 40 + "The cat"
    assert model.continuations([long], {"max_gen_toks": 8}) == model.continuations([long[-100:]], {"max_gen_toks": 8})
    drawn = model.continuations(["the"] * 6, {"do_sample": True, "temperature": 5.0, "max_gen_toks": 6})
    assert len(set(drawn)) == 6, "copies of a prompt are different samples, also over batches"


def test_generation_settings_of_tasks() -> None:
    assert sampling_of({"until": "\n"}) == SamplingConfig(0.0, max_new_tokens=256, stop=("\n",))
    assert sampling_of({"until": ["a", ""], "do_sample": False, "temperature": 0.9}).temperature == 0
    assert sampling_of({"do_sample": True}).temperature == 1
    assert sampling_of({"temperature": 0.7, "top_p": 0.9}).temperature == 0.7
    assert sampling_of({"do_sample": True, "temperature": 0.0}).temperature == 0
    assert sampling_of({"max_new_tokens": 3, "max_gen_toks": 5}).max_new_tokens == 5
    with pytest.raises(ConfigError, match="generation_kwargs: num_beams"):
        sampling_of({"num_beams": 4})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Transformer, byte_level: Tokenizer) -> Path:
    return save_run(tmp_path_factory.mktemp("tasks") / "run", model, byte_level)


def evaluate(run: Path, *arguments: str) -> int:
    return dispatch(["evaluate", str(run), "--device", "cpu", *arguments])


def test_the_command_and_its_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert evaluate(run, "--tasks", "cloze_python,cloze_english", "--limit", "12", "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "cloze_python", "cloze_english"]
    assert "guessing 0.25" in lines[1]
    written = json.loads(file.read_text())
    assert written["step"] == 7
    assert list(written["tasks"]) == ["cloze_python", "cloze_english"]
    metrics = written["tasks"]["cloze_python"]
    assert f"accuracy {metrics['accuracy']:.3f} (95% interval {metrics['accuracy_low']:.3f} to" in lines[1]
    assert metrics["items"] == 12
    assert evaluate(run, "--tasks", "cloze_english", "cloze_python", "--limit", "12", "--json", str(file)) == 0
    assert json.loads(file.read_text())["tasks"] == dict(reversed(written["tasks"].items()))


def test_from_python(run: Path, tmp_path: Path) -> None:
    found = p828.load_run(run, device="cpu").measure_tasks("cloze_python", limit=5)
    assert evaluate(run, "--tasks", "cloze_python", "--limit", "5", "--json", str(tmp_path / "found.json")) == 0
    assert json.loads((tmp_path / "found.json").read_text())["tasks"] == found


def test_the_loss_goes_to_a_file_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "loss.json"
    assert evaluate(run, "--json", str(file)) == 0
    assert f"loss           {json.loads(file.read_text())['loss']:.5f} nats" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--tasks", ""], "--tasks is empty"),
        (["--tasks", "cloze_python", "cloze_python"], "tasks: cloze_python is given twice"),
        (["--tasks", "cloze_python", "--limit", "0"], "limit = 0: a whole number of at least 1"),
        (["--tasks", "cloze_python", "--num-fewshot", "2"], "with tasks of lm-eval; p828's own have no examples"),
        (["--tasks", "cloze_python", "--tasks-path", "."], "accepted with a task of it; p828's own tasks need none"),
        (["--tasks", "cloze_python", "--rows", "2"], "--rows: accepted without --tasks"),
        (["--tasks", "cloze_python", "--data.files", "x"], "--data.files: accepted without --tasks"),
        (["--tasks", "cloze_python", "--json", "no/such/file"], "--json no/such/file: the name of a file"),
        (["--tasks", "cloze_python", "--json", "/"], "--json /: the name of a file"),
        (["--tasks", "cloze_python", "--micro-batch-size", "0"], "micro_batch_size = 0"),
        (["--limit", "3"], "--limit: accepted with --tasks"),
        (["--task", "cloze_python"], "did you mean --tasks?"),
    ],
)
def test_wrong_flags(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert evaluate(run, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) <= 2


def test_without_lm_eval_the_command_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("p828.inference.tasks.lm_eval_tasks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"did you mean cloze_python\? lm-eval.*pip install 'p828\[evaluate\]'"):
        open_all(["cloze_pyton"])
    assert open_all(["cloze_python"]).others is None
    assert not [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]
