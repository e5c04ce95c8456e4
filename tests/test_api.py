"""p828 from Python: every function against what the command gives, or the part that it is made of."""

import builtins
import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import p828
from oracles import FLOAT32, assert_near
from p828 import api
from p828.cli.main import dispatch
from p828.cli.output import printable
from p828.config import with_steps, with_vocabulary
from p828.config.values import flatten
from p828.data.batch import Batch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.engine.interface import StepResult
from runs import tiny_values, write_text, write_toml
from same_run import assert_same_run

LIGHT = """
import sys
before = set(sys.modules)
import p828
assert {name for name in sys.modules if name.startswith("p828")} == {"p828"}, sys.modules
assert not {"torch", "numpy", "datasets", "wandb", "tyro"} & set(sys.modules)
assert "load_config" in dir(p828)
config = p828.load_config("quickstart", {"train.steps": 50})
assert not {"torch", "numpy", "datasets", "wandb"} & set(sys.modules)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> p828.Run:
    """The run of `tiny.toml`, trained from Python."""
    directory = tmp_path_factory.mktemp("trained")
    config = p828.load_config(write_toml(directory), {"runs_dir": directory / "runs", "train.steps": 6})
    with contextlib.redirect_stdout(io.StringIO()):
        return p828.train_run(config)


def test_the_import_is_light() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_names() -> None:
    """The same in both places, and none that is also a package's or a module's, which its import would put there."""
    assert sorted(p828.__all__) == sorted(api.__all__)
    assert {*p828.__all__} <= {*dir(p828)}
    root = Path(p828.__file__).parent
    assert {*p828.__all__}.isdisjoint(path.stem for path in root.iterdir())
    for name in p828.__all__:
        assert getattr(p828, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'lode_config'"):
        p828.lode_config  # type: ignore[attr-defined]  # noqa: B018


# ---------- configuration


def as_flags(overrides: dict[str, Any]) -> list[str]:
    words = []
    for key, value in overrides.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train.steps": 7, "optimizer.learning_rate": 1, "name": "other", "evaluation.prompts": ("a", "b")},
        {"data.files": ["text/*.txt"]},
        {"data.hub_name": "a/b", "data.hub_subset": "c"},
        {"data.validation.files": ["text/000.txt"]},
        {"data.validation.share": 0.25, "rollback.spike_nats": 2.0, "rollback.after_steps": 3},
        {"train.tokens": 5000},
    ],
)
def test_overrides_do_what_flags_do(here: Path, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", "quickstart", *as_flags(overrides), "--dry-run"]) == 0
    shown = capsys.readouterr()
    (here / "shown.toml").write_text(shown.out)
    of_flags = flatten(p828.load_config(here / "shown.toml", {"name": overrides.get("name", "quickstart")}))
    found = p828.load_config("quickstart", overrides)
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        f"overrides: {old} is now {new}" for old, new in renamed(shown.err)
    ]
    assert flatten(with_vocabulary(with_steps(found, 1))) == of_flags


def renamed(err: str) -> list[tuple[str, str]]:
    found = re.findall(r"--(\S+) is now --(\S+)", err)
    return [(old.replace("-", "_"), new.replace("-", "_")) for old, new in found]


def test_overrides_as_tables_and_over_files(here: Path) -> None:
    path = write_toml(here)
    dotted = p828.load_config(path, {"train.steps": 9, "train.seed": 3, "data.files": [here / "text"]})
    assert dotted.train.steps == 9
    assert dotted.data.files == (str(here / "text"),)
    assert p828.load_config(str(path), {"train": {"steps": 9, "seed": 3}, "data": {"files": [here / "text"]}}) == dotted
    mixture = [{"name": "a", "files": ["text/00*"]}, {"name": "b", "hub_name": "c/d", "weights": [2]}]
    config = p828.load_config("quickstart", {"data.mixture": mixture})
    assert [source.source for source in config.data.sources] == ["files", "hf"]
    assert config.data.mixture[1].weights == (2.0,)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"train.step": 5}, r"overrides: unknown key train.step; did you mean train.steps\?"),
        ({"train.steps": "5"}, "overrides: train.steps = '5': a whole number is accepted"),
        ({"train.steps": 0}, "train.steps = 0"),
        ({"data.files": "book.txt"}, "overrides: data.files = 'book.txt': a list of texts"),
        ({"data.files": ["a"], "data.hub_name": "b"}, "data.files and data.hub_name are both given"),
        ({"deepspeed.stage": 2}, 'deepspeed.stage = 2: accepted with engine = "deepspeed"'),
        ({"train.steps": 5, "train.tokens": 500}, "one of them decides"),
        ({"train.steps": 5, "train": {"steps": 5}}, "overrides: train is given twice"),
        ({"train": 5, "train.steps": 5}, "overrides: train.steps: train is given as a value and as a table"),
        ({"train": 5}, "overrides: train = 5: a table is accepted"),
        ({"schedule.warmup_steps": 9, "train.steps": 5}, "schedule.warmup_steps = 9: at most train.steps = 5"),
    ],
)
def test_wrong_overrides(overrides: dict[str, Any], words: str) -> None:
    if "train.tokens" not in overrides and "schedule.warmup_steps" not in overrides:
        overrides = {"schedule.warmup_steps": 0, **overrides}
    with pytest.raises(p828.ConfigError, match=words):
        p828.load_config("quickstart", overrides)


def test_a_configuration_that_is_not_there() -> None:
    with pytest.raises(p828.ConfigError, match="did you mean quickstart"):
        p828.load_config("quickstrat")


# ---------- runs


def test_a_run_is_the_commands(trained: p828.Run, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same records and checkpoint, bit for bit."""
    source = trained.path.parent.parent / "tiny.toml"
    assert dispatch(["train", str(source), "--runs-dir", str(here / "runs"), "--train.steps", "6"]) == 0
    assert_same_run(trained.path, here / "runs" / "tiny", 6)
    written = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert trained.records == written
    assert [record["step"] for record in trained.records if record["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert trained.step == 6


def test_train_again_goes_on(trained: p828.Run, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(here)
    first = p828.load_config(path, {"runs_dir": here / "runs", "train.steps": 3, "schedule.kind": "constant"})
    p828.train_run(first)
    run = p828.train_run(p828.load_config(here / "runs" / "tiny", {"train.steps": 4}))
    assert run.step == 4
    assert "resumed from step 3" in capsys.readouterr().out


def test_errors_of_training(here: Path) -> None:
    config = p828.load_config(write_toml(here), {"data.files": ["nowhere/*.txt"]})
    with pytest.raises(p828.ConfigError, match="nowhere"):
        p828.train_run(config)
    assert not (here / "runs").exists()
    with pytest.raises(p828.ConfigError, match="nowhere"):
        p828.load_run("nowhere")


def test_a_notebook_gets_plain_lines(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where rich takes the process for one; there it would import IPython to print anything."""

    class ZMQInteractiveShell: ...

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    config = p828.load_config(
        write_toml(here), {"train.steps": 1, "schedule.warmup_steps": 0, "evaluation.prompts": []}
    )
    p828.train_run(config)
    out = capsys.readouterr().out
    assert "step 1/1 (100%)  loss" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.0}, {"seed": 3, "top_k": 9, "stop": "e", "max_new_tokens": 9}]
)
def test_generate_is_the_commands(
    trained: p828.Run, sampling: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = p828.load_run(trained.path, device="cpu")
    for prompt in ("ab", ""):
        assert dispatch(["generate", str(trained.path), f"--prompt={prompt}", *as_flags(sampling)]) == 0
        out = capsys.readouterr().out
        for texts in (run.generate(prompt, **sampling), run.generate([prompt], **sampling)):
            assert "".join(f"{printable(text)}\n" for text in texts) == out
    assert run.generate([]) == []
    assert len(run.generate(["ab", "ab"], max_new_tokens=2)) == 2
    with pytest.raises(p828.ConfigError, match="top_p = 2"):
        run.generate(["ab"], top_p=2)


@pytest.mark.parametrize(
    "prompts, sampling, words",
    [
        (["a"], {"bogus": 1}, "unknown setting bogus. Accepted: temperature, top_k, "),
        (["a"], {"temprature": 1}, "unknown setting temprature; did you mean temperature? Accepted: "),
        (["a"], {"max_new_tokens": 2.5}, "max_new_tokens = 2.5: a whole number of at least 1 is accepted"),
        (["a"], {"temperature": "1"}, "temperature = '1': a finite number of at least 0 is accepted"),
        (["a"], {"stop": 3}, "stop = 3: text that is not empty is accepted"),
        (["a"], {"seed": 2**63}, f"seed = {2**63}: a whole number from {-(2**63)} to {2**63 - 1} is accepted"),
        ([3], {}, "the prompt 3: a text is accepted"),
        (3, {}, "prompts = 3: a text or a list of texts is accepted"),
        (Path("a"), {}, "prompts = PosixPath('a'): a text or a list of texts is accepted"),
        (["\udcff"], {}, "the prompt '\\udcff' is not valid Unicode text"),
    ],
)
def test_what_generate_does_not_take(trained: p828.Run, prompts: Any, sampling: dict[str, Any], words: str) -> None:
    with pytest.raises(p828.ConfigError, match=f"^{re.escape(words)}"):
        trained.generate(prompts, **sampling)


@pytest.mark.parametrize("messages", [3, None, ["a"], [{"role": "user", "content": "a"}, 3]])
def test_what_answer_does_not_take(trained: p828.Run, messages: Any) -> None:
    with pytest.raises(p828.ConfigError, match=r"^messages = .*a text, or a list of objects"):
        trained.answer(messages)
    with pytest.raises(p828.ConfigError, match=r"^unknown setting bogus"):
        trained.answer("a", bogus=1)


def test_the_seeds_of_the_command(trained: p828.Run, capsys: pytest.CaptureFixture[str]) -> None:
    """As from Python: 64 bits with a sign."""
    assert dispatch(["generate", str(trained.path), "--prompt", "a", f"--seed={2**63}"]) == 2
    said = f"seed = {2**63}: a whole number from {-(2**63)} to {2**63 - 1} is accepted"
    assert said in capsys.readouterr().err
    few = {"max_new_tokens": 2}
    assert trained.generate("a", seed=-(2**63), **few) == trained.generate(["a"], seed=-(2**63), **few)


@pytest.mark.parametrize(
    "given",
    [{}, {"rows": 2}, {"micro_batch_size": 1}, {"files": "text/003.txt"}, {"files": ["text/00*"], "rows": 3}],
)
def test_evaluate_is_the_commands(
    trained: p828.Run, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.path.parent.parent)
    flags = as_flags({{"files": "data.files"}.get(key, key): value for key, value in given.items()})
    assert dispatch(["evaluate", str(trained.path), *flags]) == 0
    out = capsys.readouterr().out
    result = trained.evaluate(**given)
    assert f"loss           {result.loss:.5f} nats" in out
    assert f"perplexity     {result.perplexity:.5g}\n" in out
    assert f"bits per byte  {result.bits_per_byte:.5f}\n" in out
    assert re.search("\ntext           .* rows of 32 tokens of .", out)
    assert f"on             {result.tokens:,} tokens, {result.bytes:,} bytes" in out


def test_wrong_files_to_evaluate(trained: p828.Run) -> None:
    with pytest.raises(p828.ConfigError, match="nowhere"):
        trained.evaluate(files=["nowhere.txt"])
    with pytest.raises(p828.ConfigError, match=r"evaluation\.rows = -1"):
        trained.evaluate(rows=-1)


def test_a_checkpoint_is_a_run_too(trained: p828.Run) -> None:
    run = p828.load_run(trained.path / "checkpoints" / "step_00000004")
    assert run.step == 4
    assert run.records == trained.records
    assert run.config == dataclasses.replace(trained.config)
    assert not torch.equal(run.model.head_weight, trained.model.head_weight)


# ---------- the parts one by one


@pytest.fixture
def config(here: Path) -> p828.Config:
    return p828.load_config(write_toml(here), {"model.vocab_size": 0, "train.micro_batch_size": 3})


@pytest.fixture
def tokenizer(config: p828.Config) -> Tokenizer:
    return p828.build_tokenizer(config)


@pytest.fixture
def batch(config: p828.Config, tokenizer: Tokenizer) -> Iterator[Batch]:
    with p828.batches(config, tokenizer) as batches:
        yield next(batches)


def test_parts_are_the_runs(trained: p828.Run) -> None:
    """Tokenizer, batches and the engine's steps, against a run's own."""
    config = dataclasses.replace(trained.config, runs_dir="elsewhere")
    tokenizer = p828.build_tokenizer(config)
    assert tokenizer.fingerprint() == trained.tokenizer.fingerprint()
    engine = p828.build_engine(config, tokenizer)
    results: list[StepResult] = []
    steps = [record for record in trained.records if record["kind"] == "step"]
    with p828.batches(config, tokenizer) as batches:
        for record in steps:
            of_step = [next(batches) for _ in range(config.train.gradient_accumulation)]
            for batch in of_step:
                engine.forward_backward(batch, sum(batch.num_targets for batch in of_step))
            results.append(engine.step(record["lr"]))
    assert [result.loss for result in results] == [record["loss"] for record in steps]
    for name, weight in engine.model.state_dict().items():
        assert torch.equal(weight, trained.model.state_dict()[name]), name
    assert not Path("elsewhere").exists()


def test_model_and_loss(config: p828.Config, tokenizer: Tokenizer, batch: Batch, here: Path) -> None:
    model, engine = p828.build_model(config, tokenizer), p828.build_engine(config, tokenizer)
    assert model.config == engine.model.config
    assert model.config.vocab_size == 384
    for name, weight in engine.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    loss = p828.loss(model, batch)
    loss.backward()
    engine.forward_backward(batch, batch.num_targets)
    gradients = {id(parameter): total.clone() for parameter, total in engine.gradients.sums.items()}
    assert engine.step(0.0).loss == loss.item()
    for (name, own), theirs in zip(model.named_parameters(), engine.model.parameters(), strict=True):
        assert own.grad is not None, name
        assert_near(own.grad, gradients[id(theirs)], FLOAT32)
    exact = p828.loss(model.double(), batch, dtype=torch.float64)
    assert exact.dtype == torch.float64
    assert exact.item() == pytest.approx(loss.item(), rel=FLOAT32)
    assert sorted(path.name for path in here.iterdir()) == ["text", "tiny.toml"]  # no run, no tokenizer


def test_prepared_tokenizer(config: p828.Config, tokenizer: Tokenizer, here: Path) -> None:
    assert dispatch(["prepare", str(here / "tiny.toml"), "--data.prepared", "tokens"]) == 0
    prepared = p828.load_config("quickstart", {"data.prepared": "tokens", "tokenizer.vocab_size": 300})
    assert prepared.data.files == config.data.files
    assert p828.build_tokenizer(prepared).fingerprint() == tokenizer.fingerprint()


def test_wrong_parts(config: p828.Config, tokenizer: Tokenizer) -> None:
    with pytest.raises(p828.ConfigError, match=r"model.vocab_size = 0 .* give the tokenizer"):
        p828.build_model(config)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=260))
    with pytest.raises(p828.ConfigError, match=r"vocabulary of 300 exceeds model\.vocab_size = 260"):
        p828.build_engine(small, tokenizer)
    with pytest.raises(p828.ConfigError, match='engine = "deepspeed"'):
        p828.build_engine(dataclasses.replace(config, engine="deepspeed"), tokenizer)
    with pytest.raises(p828.ConfigError, match="hidden_size = 0"):
        p828.build_model(dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=0)), tokenizer)


# ---------- the documents


def test_the_loop_in_the_docs(config: p828.Config, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(lines, "docs/python.md", "exec"), {"p828": p828, "config": config, "tokenizer": tokenizer})
    first, _, last = map(float, capsys.readouterr().out.split())
    assert 0 < last < first


def test_the_readmes_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand there, with overrides that make the run a small one."""
    write_text(here / "text")
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "import p828" in block]
    assert len([line for line in lines.splitlines() if line]) <= 10
    values = {key: value for key, value in tiny_values(here).items() if key not in ("train", "schedule")}
    given = '{"train.steps": 300}'
    assert lines.count(given) == 1
    small = {**values, "train.steps": 3, "schedule.warmup_steps": 2, "evaluation.bigram_baseline": False}
    exec(compile(lines.replace(given, repr(small)), "README.md", "exec"), {})
    assert "runs/quickstart is complete at step 3" in capsys.readouterr().out
