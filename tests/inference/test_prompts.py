"""Files of prompts, and the file of their completions."""

import json
from pathlib import Path
from typing import Any

import pytest

from p828.config import TokenizerConfig
from p828.data.tokenizer.chat_template import BUILT_IN, ChatTemplate
from p828.data.tokenizer.training import train_tokenizer
from p828.errors import ConfigError, DataError
from p828.files import locked
from p828.inference.completions_file import open_completions
from p828.inference.prompts import GivenPrompt, check_one_kind, read_prompts

ASKED = {"messages": [{"role": "user", "content": "Hi"}]}
SETTINGS = {"temperature": 0.8, "prompts": "abc"}


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    """Also one written by Windows; an empty line begins a document, and only a newline ends a line."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffdef \r\n\r\na\u2028b\x0bc\nlast é".encode())
    prompts = read_prompts(path)
    assert [prompt.fields for prompt in prompts] == [
        {"prompt": "def "},
        {"prompt": ""},
        {"prompt": "a\u2028b\x0bc"},
        {"prompt": "last é"},
    ]
    assert prompts[3].where == f"{path}, line 4"


def test_json_lines_keep_what_else_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb", "id": [7]}\n\n' + json.dumps(ASKED) + "\n")
    first, second = read_prompts(path)
    assert first.fields == {"prompt": "a\nb", "id": [7]}
    assert (second.has_messages, second.shown, second.where) == (True, "Hi", f"{path}, line 3")
    with pytest.raises(DataError, match=r"line 3 has messages, where .*line 1 has prompt: one kind"):
        check_one_kind([first, second])


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"prompt": "a"}\n{"prompt": ', "line 2: no JSON: "),
        (b'["a"]', 'line 1: a JSON object with prompt or messages is accepted, not \\["a"\\]'),
        (b'{"promt": "a"}', "neither prompt nor messages: one of them is accepted; did you mean prompt?"),
        (b'{"prompt": "a", "messages": []}', "has both prompt and messages"),
        (b'{"prompt": 3}', "prompt is 3: a text is accepted"),
        (b'{"messages": []}', "a list of messages is accepted"),
        (b'{"messages": [{"role": "usr", "content": "a"}]}', "did you mean user?"),
        (b'{"prompt": "a", "text": ""}', "has 'text', which the output has of its own"),
        (b'{"prompt": "a", "prompt": "b"}', 'no JSON: "prompt" is given twice'),
        (b'{"prompt": "a", "score": NaN}', "no JSON: NaN is not a finite number"),
        (b'{"prompt": "a", "score": -1e999}', "no JSON: -1e999 is not a finite number"),
        (b'{"prompt": "a", "score": ' + b"9" * 5000 + b"}", "no JSON: a number of 5,000 digits: at most 4,300"),
        (b"[" * 100_000, "line 1: no JSON: nested too deeply"),
        (b'{"prompt": "\xff"}', "line 1: not UTF-8 text"),
        (b"", "holds no prompt"),
    ],
)
def test_wrong_content_is_named_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_prompts(path)


@pytest.mark.parametrize("name", ["none.txt", ".", "prompts.json"])
def test_what_is_no_file_of_prompts(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--prompts "):
        read_prompts(tmp_path / name)


def test_messages_become_the_tokens_of_the_template(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), ["Hi there, who are you? " * 9])
    tokenizer.template = ChatTemplate(BUILT_IN["chatml"], {}, tokenizer.special_tokens, "chatml")
    asked = GivenPrompt(ASKED, "here")
    text = "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked.encoded(tokenizer, 900, is_chat=False, system="Brief.")[1]) == text
    as_text = GivenPrompt({"prompt": "Hi"}).encoded(tokenizer, 900, is_chat=True, system="Brief.")
    assert as_text == asked.encoded(tokenizer, 900, is_chat=True, system="Brief.")
    own = GivenPrompt({"messages": [{"role": "system", "content": "x"}, *ASKED["messages"]]}, "FILE, line 2")
    with pytest.raises(ConfigError, match="FILE, line 2: it begins with a system message, and --system gives another"):
        own.encoded(tokenizer, 900, is_chat=True, system="Brief.")
    with pytest.raises(ConfigError, match=r"here: the prompt has \d+ tokens: at most 3"):
        asked.encoded(tokenizer, 4, is_chat=True, system="")


def written(path: Path, lines: int, total: int = 3, settings: dict[str, Any] = SETTINGS) -> int:
    """Write so many more lines, as a command that is interrupted then unless all are there; those there before."""
    with open_completions(path, settings, total) as file:
        before = file.done
        for _ in range(lines):
            file.write({"place": file.done})
        if file.done < total:
            raise KeyboardInterrupt
    return before


def test_a_file_is_there_whole_or_goes_on(tmp_path: Path) -> None:
    path, partial = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        written(path, 0)
    assert not partial.exists(), "nothing is kept of nothing"
    with pytest.raises(KeyboardInterrupt):
        written(path, 2)
    assert not path.exists()
    with (partial / "lines.jsonl").open("ab") as file:
        file.write(b'{"place": 2, "te')  # as of a process that was killed in a write
    assert written(path, 1) == 2
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"place": n} for n in range(3)]
    assert not partial.exists()
    with pytest.raises(ConfigError, match="is there already"):
        written(path, 3)


def test_a_file_goes_on_with_the_same_settings_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        written(path, 1)
    with pytest.raises(ConfigError, match=r"was begun with temperature = 0.8 and not 0.7\n.*remove it to begin anew"):
        written(path, 2, settings={**SETTINGS, "temperature": 0.7})
    with locked(tmp_path / "out.jsonl.partial", "held"), pytest.raises(ConfigError, match="another process"):
        written(path, 2)
    lines = tmp_path / "out.jsonl.partial" / "lines.jsonl"
    lines.write_text("no JSON\n{}\n")
    with pytest.raises(DataError, match="damaged at line 1; remove"):
        written(path, 2)
    (tmp_path / "out.jsonl.partial" / "settings.json").write_text("[")
    with pytest.raises(ConfigError, match="damaged; remove"):
        written(path, 2)


def test_a_text_that_is_no_unicode_is_written_as_json_has_it(tmp_path: Path) -> None:
    with open_completions(tmp_path / "out.jsonl", {}, 1) as file:
        file.write({"id": "\ud800é"})
    assert json.loads((tmp_path / "out.jsonl").read_bytes()) == {"id": "\ud800é"}
