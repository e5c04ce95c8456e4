"""`p828 export`: the files of an export."""

import json
import logging
import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from export_cases import FILES, NATIVE
from safetensors import safe_open
from tokenizers import processors
from torch import Tensor
from transformers import AutoTokenizer

import p828
from exported import EOS, in_transformers, letters, load, save_model
from p828.cli.main import dispatch
from p828.config import Config, DataConfig, TokenizerConfig, TrainConfig
from p828.config import load as load_config
from p828.data.tokenizer.chat_template import built_in
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.interchange.architectures.glm4_moe import GLM4_MOE
from p828.interchange.architectures.own import code_files
from p828.interchange.export import export_model, shared_settings, tokenizer_json
from p828.interchange.model_card import model_card
from p828.interchange.weights import WrittenTensor, written_tensors
from p828.runs import checkpoint
from p828.runs.file_names import MANIFEST_FILE
from p828.runs.manifest import describe, manifest_bytes, read_manifest
from p828.runs.tensors import TensorShard, write_tensors
from p828.runs.train_state import TrainState
from runs import run_config, write_toml
from tiny import tiny_model
from tokenizer_kinds import EOS as KINDS_EOS
from tokenizer_kinds import KINDS, TRAINING_TEXT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def test_files_of_a_trained_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model card has the run's numbers, and config.toml trains again."""
    trained = p828.train_run(run_config(tmp_path, model=NATIVE))
    exported = tmp_path / "some" / "where"
    assert trained.export(tmp_path / "from Python").directory == tmp_path / "from Python"
    capsys.readouterr()
    assert dispatch(["export", str(trained.path), str(exported)]) == 0
    said = capsys.readouterr().out
    assert "exported as    glm4_moe\n" in said
    assert "in 1 file\n" in said
    assert {path.name for path in exported.iterdir()} == FILES
    assert os.listdir(exported.parent) == ["where"]
    for name in FILES:
        assert (exported / name).read_bytes() == (tmp_path / "from Python" / name).read_bytes()
    evaluations = [record for record in trained.records if record["kind"] == "eval"]
    card = (exported / "README.md").read_text()
    for part in (
        "library_name: transformers\n",
        f"{sum(p.numel() for p in trained.model.parameters()):,} parameters",
        "trained from scratch on 1,536 tokens with p828",
        str(tmp_path / "text" / "*.txt"),
        "12 of 12",
        f"Validation loss {evaluations[-1]['loss']:.4f}",
        *(f"| {record['step']} | {record['loss']:.5g} |" for record in evaluations),
    ):
        assert part in card, part
    assert "{" not in card
    settings = tomllib.loads((exported / "config.toml").read_text())
    assert "runs_dir" not in settings
    assert not {"wandb", "trackers"} & set(settings)
    again = load_config(str(exported / "config.toml"))
    assert (again.model, again.data, again.optimizer) == (
        trained.config.model,
        trained.config.data,
        trained.config.optimizer,
    )


def test_code_of_its_own_lies_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_model(tmp_path / "run", tiny_model())
    assert dispatch(["export", str(run), str(tmp_path / "export")]) == 0
    said = capsys.readouterr().out
    assert "exported as    p828, with code of its own\n" in said
    assert f'from_pretrained("{tmp_path / "export"}", trust_remote_code=True)' in said
    assert {path.name for path in (tmp_path / "export").iterdir()} == {*FILES, *(file.name for file in code_files())}


def run_snippet(file: Path, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The only Python in a document, which may neither ask nor warn."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for snippet in re.findall("^```python\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL):
            if text in snippet:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    exec(snippet, {})
                return
    finally:
        logger.removeHandler(caplog.handler)
    pytest.fail(f"no snippet in {file} has {text}")


@pytest.mark.parametrize("name", ["continued", "asked"])
def test_what_documents_say_of_loading_runs_as_it_is(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a directory that is transformers' first of that name, of a model with code of its own."""
    ours, data = letters("<|im_start|>", "<|im_end|>"), DataConfig(sequence_length=32)
    if name == "asked":
        ours.template = built_in("chatml", EOS, ours.special_tokens)
        data = replace(data, source="files", files=("talk.jsonl",), messages_field="messages")
    model = tiny_model(max_position_embeddings=512)
    directory = tmp_path / ("chat-hf" if name == "asked" else "quickstart-hf")
    export_model(save_model(tmp_path / "run", model, ours, data=data), directory)
    document = ROOT / "docs" / ("chat.md" if name == "asked" else "interchange.md")
    monkeypatch.chdir(tmp_path)
    run_snippet(document, "generate", monkeypatch, caplog)
    monkeypatch.chdir(directory)
    run_snippet(directory / "README.md", "apply_chat_template" if name == "asked" else "Once", monkeypatch, caplog)
    assert not caplog.records
    assert capsys.readouterr().out


ORIGINS = {
    "a run that began from another": (
        0,
        5000,
        "runs/english",
        "It was trained from the weights of `runs/english` on 5,000 tok",
    ),
    "a model from elsewhere": (0, 0, "", "p828 did not train it; how it was trained is known where it comes from."),
    "an export": (40, 0, "", "p828 imported it from an export of a run of 40 steps, whose model card says more of it."),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_the_card_says_where_a_model_comes_from(case: str) -> None:
    """Of an imported one it says nothing of data, steps, losses and settings, which are not known."""
    step, tokens, origin, words = ORIGINS[case]
    config = Config(train=TrainConfig(init_from=origin))
    card = model_card(config, TrainState(step=step, tokens=tokens), 0.0, None, [], GLM4_MOE, "float32")
    assert words in card
    for part in ("standard library", "## Training", "## Losses", "learning rate", "The whole configuration"):
        assert (part in card) == (tokens > 0), part
    assert "What it was trained on is not known here." in card or tokens


@pytest.mark.parametrize(
    "name, exported",
    [
        ("train", "train"),
        ("gpt2", "gpt2"),
        ("some/where", "some/where"),
        ("tokens.json", "tokenizer.json"),
        ("theirs/tokenizer.json", "tokenizer.json"),
        ("../theirs", "tokenizer.json"),
        ("/home/user/theirs", "tokenizer.json"),
        ("here", "tokenizer.json"),
    ],
)
def test_no_path_of_a_tokenizer_leaves(
    name: str, exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    config = Config(tokenizer=TokenizerConfig(name=name, chat_template="templates/own.jinja"))
    assert shared_settings(config)["tokenizer"]["name"] == exported
    assert shared_settings(config)["tokenizer"]["chat_template"] == ""


def test_without_records_the_card_says_so(run: Path, tmp_path: Path) -> None:
    export_model(run / "checkpoints" / "step_00000010", tmp_path / "export")
    assert "there is no curve" in (tmp_path / "export" / "README.md").read_text()


def test_several_files_as_the_hub_has_them(run: Path, tmp_path: Path) -> None:
    reports: list[str] = []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export_model(run, whole)
    export_model(run, parts, report=reports.append, largest_file=40_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in parts.glob("*.safetensors"))
    assert names == [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)]
    assert len(names) > 2
    assert reports == [f"writing {name}" for name in names]
    expected = tensors_of(whole)
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in expected.values()),
        "total_parameters": sum(tensor.numel() for tensor in expected.values()),
    }
    for name, file in index["weight_map"].items():
        with safe_open(parts / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), expected[name])
    assert index["weight_map"].keys() == expected.keys()
    state = load(whole).state_dict()
    for name, tensor in load(parts).state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_checkpoint_that_several_ranks_wrote(run: Path, tmp_path: Path) -> None:
    """Each rank has a third of every tensor's numbers, cut anywhere."""
    whole = run / "checkpoints" / "step_00000010"
    parted = tmp_path / "checkpoints" / whole.name
    parted.mkdir(parents=True)
    state = tensors_of(whole)
    files: dict[str, Any] = {}
    for rank in range(3):
        shards = {}
        for name, tensor in state.items():
            begin, end = (tensor.numel() * part // 3 for part in (rank, rank + 1))
            shards[name] = TensorShard(tensor.flatten()[begin:end], begin, tuple(tensor.shape))
        file = f"model.rank_{rank:04}.safetensors"
        files[file] = write_tensors(parted / file, shards)
    (parted / "state.json").write_bytes((whole / "state.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    manifest = {**read_manifest(whole), "files": {**files, "state.json": describe(parted / "state.json")}}
    (parted / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))
    export_model(run, tmp_path / "whole")
    export_model(tmp_path, tmp_path / "parted")
    for name in FILES:
        assert (tmp_path / "parted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_table_of_tensors_covers_the_model(run: Path) -> None:
    """Every number once: the places of a tensor's pieces make it whole."""
    path = run / "checkpoints" / "step_00000010"
    model = tiny_model(**NATIVE)
    with checkpoint.opened(path, names=["model"]) as saved:
        written = written_tensors(GLM4_MOE.pieces, model.config, saved.tensors, torch.float32)
    counts = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    for tensor in written:
        counts[tensor.source][tensor.place] += 1
        assert counts[tensor.source][tensor.place].shape == tensor.shape
    assert all((count == 1).all() for count in counts.values())
    assert len({tensor.name for tensor in written}) == len(written)
    assert WrittenTensor("a", "a", (), (3, 4), torch.bfloat16).bytes == 24


def test_an_empty_directory_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    export_model(run, tmp_path / "export")
    assert {path.name for path in (tmp_path / "export").iterdir()} == FILES


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Also one that would put a token before each text, which training never saw."""
    inner = KINDS[kind]()
    end = inner.token_to_id(KINDS_EOS)
    around: Any = processors.TemplateProcessing(f"{KINDS_EOS} $A", special_tokens=[(KINDS_EOS, end)])
    inner.post_processor = around
    ours = Tokenizer(inner, KINDS_EOS)
    model = tiny_model(**NATIVE, vocab_size=512)
    export_model(save_model(tmp_path / "run", model, ours, KINDS_EOS), tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.eos_token_id == ours.eos_id
    for text in TRAINING_TEXT[:4]:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_chat_template_goes_along(tmp_path: Path) -> None:
    """An answer ends with another token than a document, and `generate` is told of both."""
    ours = letters("<|im_start|>", "<|im_end|>")
    ours.template = built_in("chatml", EOS, ours.special_tokens)
    export_model(save_model(tmp_path / "run", tiny_model(**NATIVE), ours), tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    messages = [{"role": "user", "content": "hello"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.template.render(messages, add_generation_prompt=True)
    assert "<|im_end|>" in rendered
    model = load(tmp_path / "export")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == list(ours.end_ids)
    assert theirs.convert_ids_to_tokens(ours.end_ids) == [EOS, "<|im_end|>"]
    assert (theirs.eos_token, theirs.pad_token) == (EOS, EOS)


def test_dropout_of_a_tokenizer_is_left_out() -> None:
    spec = json.loads(KINDS["byte_level"]().to_str())
    spec["model"]["dropout"] = 0.5
    ours = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), KINDS_EOS)
    assert json.loads(tokenizer_json(ours))["model"]["dropout"] is None
    assert tokenizer_json(letters()) == letters().to_json()


@pytest.mark.parametrize(
    "changes, lines",
    [
        (["--model.attention-sinks", "false"], ["# exports as glm4_moe", "# exports to .gguf as glm4moe"]),
        (["--model.n-shared-experts", "0"], ["# exports as mimo_v2_flash", "# exports to .gguf as mimo2"]),
        (
            ["--model.scoring-func", "softmax"],
            [
                "# exports with remote code: sinks, softmax router",
                "# exports to no .gguf: not in glm4moe: sinks; not in mimo2: shared expert, softmax router",
            ],
        ),
        (
            [],
            [
                "# exports with remote code: sinks",
                "# exports to no .gguf: not in glm4moe: sinks; not in mimo2: shared expert",
            ],
        ),
    ],
)
def test_a_dry_run_says_what_a_model_is_exported_as(
    changes: list[str], lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(["train", str(write_toml(tmp_path)), "--dry-run", *changes]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == lines


def test_loads_under_another_name_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to an empty directory is filled where it points to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "export").symlink_to("real")
    in_transformers(tiny_model(**NATIVE), tmp_path)
    assert {path.name for path in (tmp_path / "real").iterdir()} == FILES
