"""`p828 generate` and `p828 evaluate`, in this process and as a command with a pipe."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_run import save_run
from taught_text import TAUGHT

from p828.cli.generation.asking import Asking
from p828.cli.generation.completions import complete
from p828.cli.generation.interactive import Conversation, Interrupts
from p828.cli.main import dispatch
from p828.cli.output import printable
from p828.config import Config, DataConfig, facts_by_key, facts_of
from p828.config.values import flatten
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.generate import Piece
from p828.inference.load import load_model
from p828.inference.prompts import GivenPrompt
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from p828.runs import records
from p828.train.build import train
from runs import run_config, write_text, write_toml
from tiny import tiny_model


@pytest.fixture
def run(tmp_path: Path, taught: Transformer, byte_level: Tokenizer) -> Path:
    return save_run(tmp_path / "run", taught, byte_level)


def generate(run: Path, *arguments: str) -> int:
    return dispatch(["generate", str(run), "--device", "cpu", "--temperature", "0", *arguments])


def test_one_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--prompt", "") == 0
    assert capsys.readouterr().out == TAUGHT + "\n"
    assert generate(run, "--prompt", "", "--stop", "nothing", "--stop", " on") == 0
    assert capsys.readouterr().out == "The cat 🙂 sat\n"
    assert generate(run, "--prompt", "", "--max-new-tokens", "3") == 0
    assert 1 < len(capsys.readouterr().out) < 12


def test_text_that_begins_with_dashes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--prompt", "--help me", "--prompt", "---", "--stop", "---", "--max-new-tokens", "2") == 0
    out = capsys.readouterr().out
    assert "--- 1: --help me\n" in out
    assert "--- 2: ---\n" in out


@pytest.mark.parametrize(
    "flags",
    [
        ("--repetition-penalty", "0.001"), ("--repetition-penalty", "1000"), ("--temperature", "1e-5"),
        ("--temperature", "1e308"), ("--top-p", "1e-300"), ("--min-p", "1"), ("--top-k", "9" * 30), ("--seed", "-1"),
        ("--max-new-tokens", "9" * 30), ("--seed", str(2**63 - 1)), ("--seed", str(-(2**63))),
    ],
)  # fmt: skip
def test_numbers_at_their_ends(run: Path, flags: tuple[str, str]) -> None:
    """What is accepted can be computed with."""
    few = () if "--max-new-tokens" in flags else ("--max-new-tokens", "4")
    assert dispatch(["generate", str(run), "--device", "cpu", "--prompt", "the cat", *flags, *few]) == 0


def test_several_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--prompt", "", "--prompt", "the \x1b[31mcat", "--max-new-tokens", "60") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"--- 1: \n{TAUGHT}\n--- 2: the \\x1b[31mcat\n")


def test_interactive(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is too long is answered, and the next line continued."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n" + "0" * 70 + "\n\n"))
    assert generate(run, "--interactive") == 0
    out, err = capsys.readouterr()
    assert out == f"{TAUGHT}\n{TAUGHT}\n"
    assert err.startswith("p828: the prompt has 70 tokens")


def test_a_full_context_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--prompt", "0" * 63) == 0
    assert "the model's context of 64 tokens is full" in capsys.readouterr().err


def test_a_text_slides_on_in_a_full_context(run: Path, tmp_path: Path) -> None:
    flags = ("--prompt", "0" * 63, "--max-new-tokens", "30", "--output")
    assert generate(run, *flags, str(tmp_path / "ends")) == 0
    assert generate(run, *flags, str(tmp_path / "slides"), "--slide") == 0
    ends, slides = (json.loads((tmp_path / name).read_text()) for name in ("ends", "slides"))
    assert (ends["finish_reason"], ends["tokens"]) == ("context", 1)
    assert slides["finish_reason"] in ("end", "length")
    assert slides["tokens"] > 1


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "nothing to continue: give --prompt TEXT, --prompts FILE or --interactive"),
        (["--prompt", "a", "--temprature", "1"], "unknown flag --temprature; did you mean --temperature?"),
        (["--prompt", "a", "--temperature", "hot"], "--temperature"),
        (["--prompt", "a", "--top-p", "2"], "top_p = 2.0: a fraction above 0 and up to 1 is accepted"),
        (["--prompt", "a", "--top-p", "0"], "top_p = 0.0: a fraction above 0 and up to 1 is accepted"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0: a finite number of at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature = nan: a finite number of at least 0"),
        (["--prompt", "a", "--temperature", "inf"], "temperature = inf: a finite number of at least 0"),
        (["--prompt", "a", "--stop", "b", "--stop", ""], "stop = '': text that is not empty is accepted"),
        (["--prompt", "a", "--repetition-penalty", "1e-45"], "repetition_penalty = 1e-45: a number from 0.001"),
        (["--prompt", "a", "--top-k", "1" * 5000], "--top-k '111"),
        (["--prompt", "a", "--max-new-tokens", "-" + "1" * 4000], "max_new_tokens = -111"),
        (["--prompt", "a", "--device", "tpu"], "tpu"),
        (["--prompt", "a\udcff"], "not valid Unicode"),
    ],
)
def test_wrong_flags(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert dispatch(["generate", str(run), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) <= 2


def test_a_model_cannot_steer_the_terminal() -> None:
    text = "a\tb\nc é 🙂 漢"
    assert printable(text) == text
    assert printable("\x1b]0;title\x07\r\b\x7f\x9b2J") == r"\x1b]0;title\x07\x0d\x08\x7f\x9b2J"


def test_what_the_model_writes_is_escaped(
    tmp_path: Path, byte_level: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose head knows the escape character only."""
    model = tiny_model(vocab_size=288)
    escape = byte_level.encode("\x1b")
    assert len(escape) == 1
    with torch.no_grad():
        hidden_SH = model(torch.tensor([byte_level.encode("the")])).hidden_BSH[0]
        model.head_weight.zero_()
        model.head_weight[escape[0]] = hidden_SH[-1]
    run = save_run(tmp_path / "escape", model, byte_level)
    assert generate(run, "--prompt", "the", "--max-new-tokens", "1") == 0
    assert capsys.readouterr().out == "\\x1b\n"


def test_a_closed_pipe_ends_quietly(run: Path) -> None:
    command = [sys.executable, "-m", "p828", "generate", str(run), "--prompt", "", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    note = b"p828: loading the model\n"  # on a busy machine
    assert process.stderr.read().replace(note, b"") == b""
    process.stderr.close()
    assert process.wait(60) == 0


def evaluation(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> dict[str, str]:
    assert dispatch(["evaluate", str(run), "--device", "cpu", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)  # type: ignore[misc]


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str], byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TAUGHT)
    values = evaluation(capsys, run)
    assert list(values) == ["checkpoint", "loss", "perplexity", "bits per byte", "on", "text"]
    assert values["checkpoint"].endswith("step_00000007 (step 7)")
    assert values["on"].startswith("16 tokens")  # one row, as the run's configuration says
    assert values["text"].startswith("at most 1 rows of 16 tokens of ['")
    everything = evaluation(capsys, run, "--rows", "99", "--micro-batch-size", "1")
    # Rows of 17 tokens: the first of each has nothing before it in its row to be predicted from.
    targets = [*ids[1:17], *ids[18:], byte_level.eos_id]
    text = byte_level.decode(ids[1:17]) + byte_level.decode(ids[18:])
    assert everything["on"] == f"{len(targets)} tokens, {len(text.encode())} bytes"
    assert evaluation(capsys, run, "--rows", "99", "--micro-batch-size", "5") == everything


def test_evaluate_on_other_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("zebra zebra zebra")
    own = evaluation(capsys, run, "--rows", "9")
    flags = ["--data.source", "files", "--data.validation.files", str(tmp_path / "*.txt")]
    other = evaluation(capsys, run, "--rows", "9", *flags)
    assert float(other["loss"].split()[0]) > 2 * float(own["loss"].split()[0])
    assert dispatch(["evaluate", str(run), "--device", "cpu", "--data.validation.files", "none/*.txt"]) == 2
    assert "none/*.txt" in capsys.readouterr().err


def test_evaluate_measures_all_of_the_given_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], byte_level: Tokenizer
) -> None:
    """Every row, nothing held out, whatever the run's own data are; --rows bounds it."""
    texts = [f"{TAUGHT} {number}" for number in range(12)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    ids = [token for text in texts for token in (*byte_level.encode(text), byte_level.eos_id)]
    rows = [ids[start : start + 17] for start in range(0, len(ids), 17)]
    targets = sum(max(len(row) - 1, 0) for row in rows)
    for flag in ("--data.files", "--data.validation.files"):
        values = evaluation(capsys, run, flag, str(tmp_path / "*.txt"))
        assert values["on"].startswith(f"{targets} tokens, ")
        assert values["text"].startswith("all rows of 16 tokens of ['")
        values = evaluation(capsys, run, flag, str(tmp_path / "*.txt"), "--rows", "2")
        assert values["on"].startswith("32 tokens, ")
        assert values["text"].startswith("at most 2 rows of 16 tokens of ['")
    explicit = evaluation(capsys, run, "--data.source", "files", "--data.files", str(tmp_path / "*.txt"))
    assert explicit["on"].startswith(f"{targets} tokens, ")
    assert dispatch(["evaluate", str(run), "--device", "cpu", "--data.files", "none/*.txt"]) == 2
    assert "none/*.txt" in capsys.readouterr().err


def test_the_help_of_evaluate_lists_what_it_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dispatch(["evaluate", "--help"])
    said = capsys.readouterr().out
    listed = set(re.findall(r"--(data\.[\w.-]+)", said.partition("data options")[2]))
    assert listed == {
        f"data.{key.replace('_', '-')}"
        for key in flatten(DataConfig())
        if key != "mixture" and not facts_of(facts_by_key(Config), f"data.{key}").only_trains
    }  # fmt: skip
    options = " ".join(said.partition("data options")[2].replace("│", " ").split())
    assert set(re.findall(r"\(default: ([^)]*)\)", options)) == {"the run's"}
    assert "Paths, directories or globs" in options


def test_evaluate_on_prepared_data_that_the_run_does_not_know(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "other", 40, seed=9)
    prepared = ["--data.prepared", str(tmp_path / "prepared")]
    write_toml(tmp_path, tokenizer={"name": str(run / "tokenizer.json")}, model={"vocab_size": 0})
    flags = [*prepared, "--data.files", str(tmp_path / "other")]
    assert dispatch(["prepare", str(tmp_path / "tiny.toml"), *flags]) == 0, capsys.readouterr().err
    capsys.readouterr()
    measured = evaluation(capsys, run, *prepared, "--rows", "3")
    assert measured["on"].startswith("48 tokens")
    assert str(tmp_path / "prepared") in measured["text"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--data.streams", "2"], "--data.streams: of training alone"),
        (["--data.shuffle-rows", "2"], "--data.shuffle-rows: of training alone"),
        (["--data.files", "a", "--data.validation.files", "b"], "data.files and data.validation.files"),
        (["--data.files", "a", "--data.source", "python"], "data.files = ['a']: accepted with data.source"),
        (["--data.files", "no.md"], "p828: data.files: 'no.md' matches no file"),
        (["--data.files", "no.md", "--rows", "2"], "p828: data.files: 'no.md' matches no file"),
        (["--data.validation.files", "no.md"], "p828: data.validation.files: 'no.md' matches no file"),
        (["--data.hub-name", "x"], 'data.validation.kind = "files"'),
        (["--data.validation.kind", "files", "--data.validation.fraction", "0.5"], "data.validation.fraction = 0.5"),
        (["--rows", "0"], "rows = 0"),
        (["--micro-batch-size", "-1"], "micro_batch_size = -1"),
        (["--data.sequence-length", "65"], "max_position_embeddings = 64"),
        (["--data.sorce", "files"], "did you mean --data.source?"),
    ],
)
def test_evaluate_wrong_flags(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str) -> None:
    assert dispatch(["evaluate", str(run), "--device", "cpu", *flags]) == 2
    assert expected in capsys.readouterr().err


def test_the_text_that_the_run_held_out_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version held out whole documents, however few there were."""
    config = run_config(
        tmp_path,
        data={"files": [str(write_text(tmp_path / "few", 6))], "validation": {"kind": "held_out", "fraction": 0.3}},
        train={"steps": 2},
        evaluation={"bigram_baseline": True},
    )
    with monkeypatch.context() as earlier:
        earlier.setattr("p828.data.text.held_out.EXPECTED_DOCUMENTS", 0)
        train(config)
        first = read_kinds(config)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)))
    second = read_kinds(config)
    assert second["bigram_baseline"] == first["bigram_baseline"]
    capsys.readouterr()
    assert dispatch(["evaluate", str(config.run_dir), "--rows", str(config.evaluation.rows)]) == 0
    assert f"loss           {second['eval']:.5f} nats" in capsys.readouterr().out


def read_kinds(config: Config) -> dict[str, float]:
    """The last loss of each kind of records, and of events."""
    lines = records.read(config.run_dir / "metrics.jsonl")
    return {line.get("event", line["kind"]): line["loss"] for line in lines if "loss" in line}


def test_the_token_that_ends_is_not_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the file, in the speed, and at a terminal in how full the context is."""
    output = tmp_path / "x.jsonl"
    assert generate(run, "--prompt", "", "--prompt", "The cat", "--output", str(output)) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["finish_reason"] for line in lines] == ["end", "end"]
    said = f"p828: {sum(line['tokens'] for line in lines)} tokens, "
    assert capsys.readouterr().err.startswith(said)

    asking = Asking(load_model(run, "cpu"), SamplingConfig(temperature=0), False, "", False)
    with asking.open_decoder([asking.context]) as decoder:
        conversation = Conversation(asking, decoder)
        conversation.reply("The cat", Interrupts())
    read = len(asking.loaded.tokenizer.encode("The cat"))
    assert conversation.speed.tokens == lines[1]["tokens"]
    assert conversation.status.startswith(f"context {read + lines[1]['tokens']} of ")


def test_prompts_are_passed_over_for_their_experts_behind_all_texts(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the speed leaves that out. A pass is one of the whole model, which the decoder never calls."""
    asking = Asking(load_model(run, "cpu"), SamplingConfig(temperature=0), False, "", True)
    prompts = [asking.encoded(GivenPrompt({"prompt": text})) for text in ("The cat", "", "The")]
    events: list[str] = []
    asking.loaded.model.register_forward_hook(lambda model, inputs, output: events.append("pass"))

    class Noted:
        def take(self, piece: Piece) -> None:
            events.append("token")

    complete(asking, prompts, Noted())
    assert events == sorted(events, reverse=True)
    assert events.count("pass") == 3
    read = sum(max(len(prompt.ids), 1) for prompt in prompts) + events.count("token") - 3
    assert f"of {read} tokens" in capsys.readouterr().out
