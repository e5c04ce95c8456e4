"""A new run starts from the weights, the balance bias and the tokenizer of another model, and leaves that as it was."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import p828
from p828.cli.main import dispatch
from p828.config import Config
from p828.engine.plain import PlainEngine
from p828.errors import ConfigError, P828Error
from p828.interchange.export import export_model
from p828.interchange.origin import opened_weights, read_origin
from runs import run_config, write_text, write_toml
from tiny import joined

# float32 sums of the same numbers in another order: some units of 2^-24 of a loss near 4
TOLERANCE = 1e-6
SHORT = {"train.steps": 2, "schedule.warmup_steps": 1, "evaluation.every": 0, "evaluation.prompts": []}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the run runs/english, its export as `export`, and other text in `code`."""
    home = tmp_path_factory.mktemp("home")
    write_text(home / "code", documents=20, seed=5)
    config = run_config(home, model={"attention_sinks": False}, balance={"update_rate": 0.01})
    run = p828.train_run(Config(**{**vars(config), "name": "english"}))
    export_model(run.path, home / "export")
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def configured(source: str, name: str, **overrides: Any) -> Config:
    """A configuration of `runs/english` for the text in `code`."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return p828.load_config(
        "runs/english", {**SHORT, "name": name, "data.files": ["code/*.txt"], "train.init_from": source, **keys}
    )


def first_loss(config: Config, run: p828.Run) -> float:
    """The mean loss of `run`'s model over the targets of the first step that `config` makes."""
    with p828.batches(config, run.tokenizer) as loader, torch.no_grad():
        batches = [next(loader) for _ in range(config.train.gradient_accumulation)]
        losses = [p828.loss(run.model, batch).item() * batch.num_targets for batch in batches]
    return sum(losses) / sum(batch.num_targets for batch in batches)


SOURCES = {"a run": "runs/english", "a checkpoint": "runs/english/checkpoints/step_00000012", "an export": "export"}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_first_loss_is_the_sources(source: str, here: Path) -> None:
    english, name = p828.load_run("runs/english", "cpu"), "from_" + source.partition("/")[0] + str(len(source))
    before = (here / "runs/english/config.toml").read_bytes()
    config = configured(source, name)
    run = p828.train_run(config)
    steps = [record for record in run.records if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(first_loss(config, english), rel=TOLERANCE)
    assert steps[0]["loss"] < 4.6  # drawn weights have 5.7
    assert run.tokenizer.fingerprint() == english.tokenizer.fingerprint()
    (event,) = [record for record in run.records if record.get("event") == "init_from"]
    path = source if source == "export" else SOURCES["a checkpoint"]
    assert (event["path"], event["step_there"], event["upcycled"]) == (path, 12, False)
    assert f"begun from  {path}, step" in (run.path / "log.txt").read_text()
    assert p828.load_config(run.path).train.init_from == source
    assert (here / "runs/english/config.toml").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_bias_bit_for_bit(dtype: str, here: Path) -> None:
    """Also where an engine keeps the masters in two halves; the optimizer is new."""
    expected = load_file(SOURCES["a checkpoint"] + "/model.safetensors")
    assert any(bias.any() for name, bias in expected.items() if name.endswith("e_score_correction_bias"))
    config = configured("runs/english", "none", train__dtype=dtype)
    engine = PlainEngine(config)
    with opened_weights(read_origin(Path(SOURCES["a checkpoint"])), config) as weights:
        engine.load_weights(weights)
    state = engine.state_dict()
    found = {**state["model"], **joined(engine.masters)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert all(not moment.any() for moment in state["optimizer"].values())  # type: ignore[union-attr]


def test_from_python(here: Path) -> None:
    config = configured("runs/english", "none")
    english = p828.load_run("runs/english", "cpu")
    assert p828.build_tokenizer(config).fingerprint() == english.tokenizer.fingerprint()
    expected = english.model.state_dict()
    for model in (p828.build_model(config), p828.build_engine(config).model):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_longer_context_with_yarn(here: Path) -> None:
    """Its original context is the source's unless it is given."""
    longer = {"model__rope_scaling__factor": 4.0, "model__max_position_embeddings": 256, "data__sequence_length": 100}
    config = configured("runs/english", "longer", **longer)
    scaling = config.model.rope_scaling
    assert (scaling.factor, scaling.original_max_position_embeddings) == (4.0, 64)
    assert config.model.max_position_embeddings == 256
    run = p828.train_run(config)
    assert run.config.model == config.model
    assert p828.load_config("runs/longer").model == config.model  # also before it has a checkpoint
    again = {"name": "again", "train.init_from": "runs/longer", "train.steps": 3}
    assert p828.load_config("runs/longer", again).model == config.model
    given = configured("export", "none", **longer, model__rope_scaling__original_max_position_embeddings=32)
    assert given.model.rope_scaling.original_max_position_embeddings == 32


def test_a_file_takes_over_what_it_does_not_give(here: Path) -> None:
    """`[model]` of a preset or of a file with half of its keys: what is not given is the source's."""
    (here / "own.toml").write_text(
        '[model]\nhidden_size = 32\nnum_experts_per_tok = 1\n[train]\ninit_from = "runs/english"\n'
        "[data]\nsequence_length = 16\n"
    )
    config, english = p828.load_config("own.toml"), p828.load_config("runs/english")
    assert config.model.num_experts_per_tok == 1
    assert (config.model.vocab_size, config.model.num_hidden_layers) == (300, 2)
    assert config.model.mask_documents == english.model.mask_documents
    assert config.tokenizer == english.tokenizer
    preset = p828.load_config("quickstart", {"train.init_from": "export", "data.sequence_length": 64})
    assert preset.model == english.model


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model__hidden_size": 64}, "model.hidden_size = 64 and there 32"),
        ({"model__attention_sinks": True}, "model.attention_sinks = true and there false"),
        (
            {"model__vocab_size": 512, "model__use_qk_norm": True},
            "model.vocab_size = 512 and there 300, model.use_qk_norm = true and there false",
        ),
        ({"tokenizer__vocab_size": 400}, "tokenizer.vocab_size = 400: the tokenizer of train.init_from = runs/english"),
        ({"train__upcycle": True}, "runs/english is no dense model (n_routed_experts = 4, n_shared_experts = 1, "),
    ],
)
def test_what_is_given_and_does_not_fit(here: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        configured("runs/english", "none", **given)
    assert "\n" not in str(caught.value)


def test_upcycling_nothing(here: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("train.upcycle = true: accepted with train.init_from")):
        p828.load_config("runs/english", {"name": "none", "train.upcycle": True})


def test_another_tokenizer_is_refused_and_the_same_one_is_not(here: Path) -> None:
    shutil.copy("runs/english/tokenizer.json", "same.json")
    spec = json.loads(Path("same.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    Path("other.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"tokenizer\.name = other\.json: another tokenizer than that of runs/en"):
        p828.train_run(configured("runs/english", "other", tokenizer__name="other.json"))
    assert not Path("runs/other").exists()
    p828.train_run(configured("runs/english", "same", tokenizer__name="same.json"))


def test_prepared_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is prepared with the source's tokenizer where it is for such a run, and refused if it is not."""
    write_toml(here, data={"files": ["code/*.txt"]}, model={"attention_sinks": False})
    from_english = ["--train.init-from", "runs/english/"]
    spec = json.loads(Path("runs/english/tokenizer.json").read_text())
    Path("lower.json").write_text(json.dumps({**spec, "normalizer": {"type": "Lowercase"}}))
    other, lower = ["--tokenizer.vocab-size", "280"], ["--tokenizer.name", "lower.json"]
    for name, flags in (("other", other), ("lower", lower), ("same", from_english)):
        assert dispatch(["prepare", "tiny.toml", "--data.prepared", f"tokens/{name}", *flags]) == 0
    train = ["train", "runs/english", "--train.init-from", "runs/english", "--train.steps", "2"]
    train += ["--schedule.warmup-steps", "1"]
    capsys.readouterr()
    for name in ("other", "lower"):
        assert dispatch([*train, "--name", "prepared", "--data.prepared", f"tokens/{name}"]) == 2
        err = capsys.readouterr().err
        assert f"data.prepared = tokens/{name}: prepared with another tokenizer than that of runs/english/check" in err
        assert "p828 prepare makes it with the right one, given --train.init-from runs/english" in err
    assert not Path("runs/prepared").exists()
    assert dispatch([*train, "--name", "prepared", "--data.prepared", "tokens/same"]) == 0


def test_a_run_goes_on_without_its_source(here: Path) -> None:
    shutil.copytree("runs/english", "runs/gone")
    flags = {"model__max_position_embeddings": 128, "checkpoint__every": 2}
    p828.train_run(configured("runs/gone", "goes_on", **flags))
    shutil.rmtree("runs/gone")
    run = p828.train_run(configured("runs/gone", "goes_on", **flags, train__steps=4))
    assert run.step == 4
    assert run.config.model.max_position_embeddings == 128
    assert p828.train_run(p828.load_config("runs/goes_on", {"train.steps": 5})).step == 5
    with pytest.raises(ConfigError, match=r"train\.init_from = 'runs/gone', now 'export'"):
        p828.train_run(configured("export", "goes_on", **flags))


def _be_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("runs/english", lambda path: shutil.rmtree(path), "train.init_from = broken: no such directory; the d"),
    "a file": ("export", _be_a_file, "broken: is a file; the directory"),
    "a damaged checkpoint": (
        SOURCES["a checkpoint"],
        lambda path: _flip(path / "model.safetensors"),
        "model.safetensors is not what was written: its checksum differs",
    ),
    "no checkpoint": ("runs/english", lambda path: shutil.rmtree(path / "checkpoints"), "neither a run with a checkpo"),
    "no weights": ("export", lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor model"),
    "cut off": (
        "export",
        lambda path: os.truncate(path / "model.safetensors", 99),
        "broken/model.safetensors: cannot be read: ",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_source_that_is_none(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, damage, message = BROKEN[case]
    shutil.rmtree("broken", ignore_errors=True)
    Path("broken").unlink(missing_ok=True)
    shutil.copytree(source, "broken")
    damage(Path("broken"))
    flags = ["--train.init-from", "broken", "--name", "broken", "--train.steps", "2", "--schedule.warmup-steps", "1"]
    assert dispatch(["train", "runs/english", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs/broken").exists()
    with pytest.raises(P828Error):
        p828.train_run(configured("broken", "broken"))
    assert not Path("runs/broken").exists()
