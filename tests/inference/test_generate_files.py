"""`p828 generate` of files of prompts, and of several prompts, whose experts it shows."""

import errno
import json
import re
import time
from pathlib import Path

import pytest
from saved_run import save_run

from p828.cli.main import dispatch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import RunFailed
from p828.inference.completions_file import open_completions
from p828.inference.generate import generate
from p828.inference.load import load_model
from p828.inference.sampling_config import SamplingConfig
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

    assert asked(run, "--prompt", TEXTS[0], "--output", str(tmp_path / "one.jsonl")) == 0
    assert capsys.readouterr().out.endswith(f"\n1 completion in {tmp_path}/one.jsonl\n")


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
    assert dispatch(["generate", *flags, str(tmp_path / "killed.jsonl"), "--experts"]) == 0
    said = r"p828: \d+ of [\d,]+ prompts are done from before, whose experts are not shown\n"
    assert re.search(said, capsys.readouterr().err)
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
        (["--prompt", "a", "--slide", "--experts"], "--slide: accepted without --experts"),
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


def write_one(path: Path, meanwhile: str = "") -> None:
    """A file of one line, beside which another process may write one of the same name."""
    with open_completions(path, {}, 1) as file:
        if not file.done:
            file.write({"text": "a"})
        if meanwhile:
            path.write_text(meanwhile)


def no_link(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """All lines are kept, and the same command then goes on; also where the file system has no hard links."""
    if not has_links:
        monkeypatch.setattr("os.link", no_link)
    path = tmp_path / "x.jsonl"
    said = re.escape(f"{path}: cannot be written: File exists; all lines are in {path}.partial/lines.jsonl")
    with pytest.raises(RunFailed, match=said):
        write_one(path, "another's")
    assert path.read_text() == "another's"
    path.unlink()
    write_one(path)
    assert path.read_text() == '{"text": "a"}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["thesis.txt", "lines.jsonl", ".settings.json"])
def test_another_directory_of_that_name_is_left_as_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    partial = tmp_path / "x.jsonl.partial"
    partial.mkdir()
    (partial / name).write_text("{}\n")
    assert asked(run, "--prompt", "a", "--output", str(tmp_path / "x.jsonl")) == 2
    said = f"--output {tmp_path}/x.jsonl: {partial} holds something else"
    assert said in capsys.readouterr().err
    assert [path.name for path in partial.iterdir()] == [name]
    assert (partial / name).read_text() == "{}\n"


def test_what_others_put_beside_the_lines_stays(tmp_path: Path) -> None:
    partial = tmp_path / "x.jsonl.partial"
    with pytest.raises(KeyboardInterrupt), open_completions(tmp_path / "x.jsonl", {}, 1):
        raise KeyboardInterrupt
    assert not partial.exists()
    with open_completions(tmp_path / "x.jsonl", {}, 1) as file:
        (partial / "note.txt").write_text("mine")
        file.write({"text": "a"})
    assert [path.name for path in partial.iterdir()] == ["note.txt"]


def test_a_command_that_was_killed_before_its_settings_are_there_goes_on(tmp_path: Path) -> None:
    partial = tmp_path / "x.jsonl.partial"
    partial.mkdir()
    for name in (".lock", ".settings.json.tmp"):
        (partial / name).write_text("")
    write_one(tmp_path / "x.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
