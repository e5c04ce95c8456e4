"""Files that are no usable tokenizer end in a line, whatever the library does with them."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p828.cli.main import dispatch
from p828.data.tokenizer import trial as tokenizer_trial
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError
from runs import in_process, p828, write_toml
from tokenizer_kinds import EOS, KINDS

ADDRESS_SPACE = 4 * 2**30  # bytes
Change = Callable[[dict[str, Any]], object]
ODD: dict[str, tuple[str, Change]] = {
    "a panic when it is read": ("byte_level", lambda spec: spec["model"].update(continuing_subword_prefix="##")),
    "a panic with every text": (
        "byte_level",
        lambda spec: spec.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    ),
    "pieces of no length": ("byte_level", lambda spec: spec.update(pre_tokenizer={"type": "FixedLength", "length": 0})),
    "no token for unknown words": ("word_piece", lambda spec: spec["model"].update(unk_token="none")),
    "no id for unknown characters": ("unigram", lambda spec: spec["model"].update(unk_id=None)),
    "an id beyond the vocabulary": ("unigram", lambda spec: spec["model"].update(unk_id=10**6)),
    "the largest id there is": ("byte_level", lambda spec: spec["model"]["vocab"].update(zz=2**32 - 1)),
    "a pattern without end": (
        "byte_level",
        lambda spec: spec.update(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": "((\\w+)*\\s*)+$"}, "behavior": "Isolated", "invert": False,
            }
        ),
    ),
    "no tokens": ("byte_level", lambda spec: spec["model"].update(vocab={}, merges=[])),
    "no model": ("byte_level", lambda spec: spec.pop("model")),
}  # fmt: skip


def write_odd(path: Path, case: str) -> Path:
    kind, change = ODD[case]
    spec = json.loads(KINDS[kind]().to_str())
    change(spec)
    path.write_text(json.dumps(spec))
    return path


@pytest.mark.parametrize("case", ODD)
def test_what_cannot_be_used_is_refused(tmp_path: Path, case: str) -> None:
    path = write_odd(tmp_path / "odd.json", case)
    with pytest.raises(ConfigError) as refused:
        Tokenizer.tried(path, EOS)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400


def test_every_kind_is_taken(tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        inner = make()
        inner.save(str(tmp_path / kind))
        assert Tokenizer.tried(tmp_path / kind, EOS).encode("the cat") == Tokenizer(inner, EOS).encode("the cat")


def test_a_trial_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.001)
    with pytest.raises(ConfigError, match=r"t\.json: not usable as a tokenizer: trying it out took over 0 s"):
        tokenizer_trial.try_out(KINDS["unigram"]().to_str(), "t.json")


def test_a_run_with_one_that_panics_ends_in_a_line(tmp_path: Path) -> None:
    odd = write_odd(tmp_path / "odd.json", "a panic when it is read")
    path = write_toml(tmp_path, tokenizer={"name": str(odd), "eos_token": EOS}, model={"vocab_size": 0})
    code, _, err = in_process("train", str(path), cwd=tmp_path)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert str(odd) in err
    assert not (tmp_path / "runs").exists()


def test_an_id_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    """Of a run's own tokenizer, too, which is not tried out again: the library would end the process."""
    train = ["train", str(write_toml(tmp_path, train={"steps": 2})), "--runs-dir", str(tmp_path)]
    assert dispatch(train) == 0
    path = tmp_path / "tiny" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["zz"] = 2**31
    path.write_text(json.dumps(spec))
    limits = (ADDRESS_SPACE, ADDRESS_SPACE)
    code, _, err = p828(*train, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits))
    assert code == 2, err
    assert f"{path}: a token has the id 2147483648: at most 2097151 is accepted" in err
