"""`p828 generate` of files of prompts, and of several prompts, whose experts it shows."""

import json
import re
import time
from pathlib import Path

import pytest
from saved_run import save_run

from p828.cli.main import dispatch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.generate import generate
from p828.inference.load import load_model
from p828.inference.sampling import SamplingConfig
from runs import start
from tiny import tiny_model

TEXTS = ["the cat", "", "a dog", "the cat", "é 🙂", "sat on the mat, and so did the dog"]


@pytest.fixture
def run(tmp_path: Path, byte_level: Tokenizer) -> Path:
    return save_run(tmp_path / "run", tiny_model(vocab_size=288), byte_level)


def asked(run: Path, *arguments: str) -> int:
    return dispatch(["generate", str(run), "--device", "cpu", "--max-new-tokens", "20", *arguments])


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_prompt(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the same prompts get from Python; in a text file, in JSON lines with more in them, and on the command line."""
    loaded = load_model(run)
    completions = generate(loaded.model, loaded.tokenizer, TEXTS, SamplingConfig(max_new_tokens=20, stop=("t",)))
    expected = [
        {"prompt": text, "text": own.text, "finish_reason": own.finish_reason, "tokens": len(own.ids)}
        for text, own in zip(TEXTS, completions, strict=True)
    ]
    assert {own.finish_reason for own in completions} >= {"length", "stop"}
    assert completions[0].text != completions[3].text
    (tmp_path / "p.txt").write_text("\n".join(TEXTS) + "\n")
    flags = ["--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "text.jsonl"), "--stop", "t"]
    assert asked(run, *flags) == 0
    out, err = capsys.readouterr()
    assert read(tmp_path / "text.jsonl") == expected
    assert out == f"6 completions in {tmp_path}/text.jsonl\n"
    assert re.fullmatch(r"p828: \d+ tokens, [\d,.]+ tokens/s, first token after \d+ ms\n", err)

    lines = [{"id": number, "prompt": text} for number, text in enumerate(TEXTS[1:], start=1)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "json.jsonl"), "--stop", "t"]
    assert asked(run, "--prompt", TEXTS[0], *flags) == 0
    first, *others = read(tmp_path / "json.jsonl")
    assert first == expected[0]
    assert others == [{"id": number, **line} for number, line in enumerate(expected[1:], start=1)]


def killed(tmp_path: Path, prompts: int, flags: list[str]) -> bool:
    """Start a command that writes killed.jsonl, and kill it once there is a line; whether it was still at work then."""
    (tmp_path / "p.txt").write_text("\n".join(f"{TEXTS[n % 6]} {n % 50}" for n in range(prompts)))
    (tmp_path / "killed.jsonl").unlink(missing_ok=True)
    lines = tmp_path / "killed.jsonl.partial" / "lines.jsonl"
    process = start("generate", *flags, "killed.jsonl", cwd=tmp_path)
    while process.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.01)  # between two looks at what the process has written
    process.kill()
    process.communicate()
    return not (tmp_path / "killed.jsonl").exists()


def test_a_command_that_was_killed_goes_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After `kill -9` the same command writes the lines that are missing, and the file is that of one that was not."""
    flags = [str(run), "--device", "cpu", "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "12", "--output"]
    assert any(killed(tmp_path, prompts, flags) for prompts in (250, 1000, 4000)), "it is done before it can be killed"
    lines = tmp_path / "killed.jsonl.partial" / "lines.jsonl"
    before = lines.read_bytes()
    assert dispatch(["generate", *flags, str(tmp_path / "whole.jsonl")]) == 0
    assert dispatch(["generate", *flags, str(tmp_path / "killed.jsonl"), "--temperature", "1"]) == 2
    assert "was begun with temperature = 0.8 and not 1.0" in capsys.readouterr().err
    assert dispatch(["generate", *flags, str(tmp_path / "killed.jsonl")]) == 0
    assert re.search(r"p828: \d+ of [\d,]+ prompts are done from before", capsys.readouterr().err)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "killed.jsonl").read_bytes() == whole
    assert whole.startswith(before[: before.rfind(b"\n") + 1])
    assert not lines.parent.exists()


def test_texts_come_in_the_order_of_their_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though some end before those that stand before them."""
    flags = [word for text in TEXTS for word in ("--prompt", text)]
    assert asked(run, *flags, "--stop", "a", "--stop", "e") == 0
    out = capsys.readouterr().out
    heads = re.findall(r"^--- (\d): (.*)$", out, re.MULTILINE)
    assert heads == [(str(number), text) for number, text in enumerate(TEXTS, start=1)]
    for number, text in enumerate(TEXTS[:3]):
        assert asked(run, "--prompt", text, "--stop", "a", "--stop", "e") == 0
        alone = capsys.readouterr().out
        assert f"--- {number + 1}: {text}\n{alone}---" in out


def test_experts_of_one_prompt_and_of_several(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(run, "--prompt", "the cat", "--experts", "--max-new-tokens", "3") == 0
    out = capsys.readouterr().out
    tokens = re.findall(r"^ *(\d+)[+ ] ", out.partition("load:")[0], re.MULTILINE)
    assert tokens == [str(place) for place in range(len(tokens))]
    assert out.count("not read") == 2
    assert "Expert Usage Statistics" in out
    assert f"of {len(tokens) - 1} tokens (12.5 is even)" in out
    assert asked(run, "--prompt", "the cat", "--prompt", "the cat", "--experts", "--max-new-tokens", "3") == 0
    out = capsys.readouterr().out
    assert f"of {2 * (len(tokens) - 1)} tokens (12.5 is even)" in out
    assert "not read" not in out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--prompts", "none.txt"], "--prompts none.txt: cannot be read: No such file"),
        (["--prompts", ""], "--prompts is empty"),
        (["--output", "x.jsonl", "--interactive"], "--output x.jsonl: accepted with --prompt or --prompts"),
        (["--prompt", "a", "--output", "/proc/none/x"], "--output /proc/none/x: cannot be written"),
        (["--prompt", "a", "--system", "b"], "--system b: accepted with --chat, or with messages in --prompts"),
        (["--prompts", "m.jsonl"], "--prompts m.jsonl (messages): "),
        (["--prompts", "m.jsonl", "--prompt", "a"], "m.jsonl, line 1 has messages, where a --prompt has prompt"),
        (["--prompts", "long.txt"], "long.txt, line 2: the prompt has "),
        (["--promts", "m.jsonl"], "did you mean --prompts?"),
    ],
)
def test_wrong_flags(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    Path("long.txt").write_text("the\n" + "0" * 70 + "\n")
    assert asked(run, *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert not Path("x.jsonl.partial").exists()
