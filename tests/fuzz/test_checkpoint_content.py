"""Checkpoints whose checksums are right and whose contents are not what a run wrote: a line for each, exit code 2."""

import copy
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import places
from torch import Tensor

from p828.cli.main import dispatch
from p828.config import load
from p828.errors import ConfigError, DataError
from p828.optim.adamw import AdamW
from p828.runs import checkpoint, file_names
from p828.runs.checkpoint_content import check_content
from p828.runs.manifest import describe, manifest_bytes
from p828.runs.tensors import write_tensors
from runs import write_toml

Parts = dict[str, dict[str, Tensor]]
Change = Callable[[dict[str, Any], Parts], None]
GONE = "gone"
VALUES = [None, True, -1, 10**30, 1.5, "x", [], {}, [[1]], {"a": 1}, {"$float": "nan"}, {"$float": 3}]
NAME = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("content")
    path = write_toml(place, train={"steps": 3}, evaluation={"every": 0, "prompts": []}, checkpoint={"every": 3})
    assert dispatch(["train", str(path), "--runs-dir", str(place)]) == 0
    return place


class Changed:
    """A run whose one checkpoint is changed, and summed anew."""

    def __init__(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.capsys = trained, capsys
        self.path = trained / "tiny" / "checkpoints" / file_names.name_of(3)
        self.kept = trained / "kept"
        if not self.kept.exists():
            shutil.copytree(trained / "tiny", self.kept)
        loaded = checkpoint.load(self.kept / "checkpoints" / self.path.name)
        self.state = json.loads((self.kept / "checkpoints" / self.path.name / "state.json").read_text())
        self.tensors = loaded.tensors

    def write(self, change: Change) -> None:
        shutil.rmtree(self.place / "tiny")
        shutil.copytree(self.kept, self.place / "tiny")
        state, tensors = copy.deepcopy(self.state), {part: dict(values) for part, values in self.tensors.items()}
        change(state, tensors)
        (self.path / "state.json").write_text(json.dumps(state))
        for part, values in tensors.items():
            if values.keys() != self.tensors[part].keys() or any(
                values[name] is not self.tensors[part][name] for name in values
            ):
                (self.path / f"{part}.safetensors").unlink()
                write_tensors(self.path / f"{part}.safetensors", values)
        manifest = json.loads((self.path / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"] = {name: describe(self.path / name) for name in manifest["files"]}
        (self.path / "manifest.json").write_bytes(manifest_bytes(manifest))

    def answer(self, *arguments: str) -> tuple[int, str]:
        """Exit code and what is said on standard error, which are the form of an answer; a traceback fails here."""
        self.capsys.readouterr()
        code = dispatch(list(arguments))
        said = self.capsys.readouterr().err
        assert code in (0, 2), said
        if code == 2:
            assert said.startswith("p828: ")
            assert len(said.splitlines()) <= 2, said
            assert len(said) < 4000, said
        return code, said

    def resume(self) -> tuple[int, str]:
        return self.answer("train", str(self.place / "tiny.toml"), "--runs-dir", str(self.place))

    def generate(self) -> tuple[int, str]:
        return self.answer("generate", str(self.path), "--prompt", "ab", "--max-new-tokens", "1")


@pytest.fixture
def changed(trained: Path, capsys: pytest.CaptureFixture[str]) -> Changed:
    return Changed(trained, capsys)


def mutation(state: dict[str, Any], draw: random.Random) -> tuple[str, Change]:
    """A value of another kind, or none, somewhere in what a run goes on from."""
    key = draw.choice(["progress", "progress", "data", "data", "config", "tokenizer", "ranks"])
    way, value = (key, *draw.choice([(), *places(state[key])])), draw.choice([*VALUES, GONE])

    def change(state: dict[str, Any], tensors: Parts) -> None:
        holder: Any = state
        for step in way[:-1]:
            holder = holder[step]
        if value is GONE:
            del holder[way[-1]]
        else:
            holder[way[-1]] = value

    return f"{way} = {value!r}", change


def test_an_unchanged_one_is_taken(changed: Changed) -> None:
    changed.write(lambda state, tensors: None)
    assert changed.resume()[0] == changed.generate()[0] == 0


def test_values_of_the_state_as_commands_answer(changed: Changed) -> None:
    """What is taken nevertheless is no traceback later."""
    draw = random.Random(0)
    for _ in range(10):
        changed.write(mutation(changed.state, draw)[1])
        changed.resume()
        changed.generate()


def test_values_of_the_state(changed: Changed) -> None:
    """Each is taken, or answered by a line that names the checkpoint; without a command around, which takes longer."""
    config, draw, answers = load(str(changed.place / "tiny.toml")), random.Random(1), list[str]()
    for _ in range(200):
        changed.write(mutation(changed.state, draw)[1])
        try:
            with checkpoint.opened(changed.path) as saved:
                check_content(saved, config, changed.state["data"], AdamW.state_keys)
        except (ConfigError, DataError) as error:
            answers.append(str(error))
    assert len(answers) > 100
    assert all(changed.path.name in answer and "\n" not in answer for answer in answers)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s, t: s.pop("progress"), "progress = null: a table"),
        (lambda s, t: s["progress"].update(step=[3]), "progress.step = [3]: a whole number"),
        (lambda s, t: s["progress"].update(tokens="many"), "progress.tokens = 'many'"),
        (lambda s, t: s["progress"].update(step=2), "progress.step = 2: 3, as in the manifest"),
        (lambda s, t: s["progress"].update(best_step=4), "progress.best_step = 4"),
        (lambda s, t: s["progress"].update(source_tokens=[1, 2]), "progress.source_tokens = [1, 2]"),
        (lambda s, t: s["progress"].update(more=1), "progress.'more'"),
        (lambda s, t: s["progress"].pop("tokens"), "progress.tokens is missing"),
        (lambda s, t: s.update(data=[1]), "data = [1]: a table"),
        (lambda s, t: s["data"].update(sources=[]), "data is no place in it"),
        (lambda s, t: s.pop("config"), "holds no configuration"),
        (lambda s, t: s.update(ranks=0), "ranks = 0"),
        (lambda s, t: s.pop("tokenizer"), "another tokenizer"),
        (lambda s, t: t["model"].pop(NAME), f"the weights lack {NAME}"),
        (lambda s, t: t["model"].update(more=torch.ones(3)), "the weights hold more"),
        (lambda s, t: t["model"].update({NAME: t["model"][NAME].T.contiguous()}), f"{NAME} has the shape [32, 4]"),
        (lambda s, t: t["model"].update({NAME: t["model"][NAME].int()}), f"{NAME} holds numbers of type I32"),
        (lambda s, t: t["model"].update({NAME: t["model"][NAME].half()}), f"{NAME} holds numbers of type F16"),
        (lambda s, t: t["optimizer"].pop(f"exp_avg/{NAME}"), f"lack exp_avg/{NAME}"),
        (lambda s, t: t["optimizer"].clear(), "the optimizer's state lack"),
        (lambda s, t: t["optimizer"].update({f"exp_avg/{NAME}": torch.ones(1)}), f"exp_avg/{NAME} has the shape [1]"),
        (lambda s, t: t["optimizer"].update({f"exp_avg_sq/{NAME}": torch.ones(10**6)}), "has the shape [1000000]"),
        (lambda s, t: t["optimizer"].update({f"exp_avg/{NAME}": torch.ones(4, 32).int()}), "numbers of type I32"),
        (lambda s, t: t["optimizer"].update({f"step/{NAME}": torch.tensor(math.nan)}), "is nan: at most 3 updates"),
        (lambda s, t: t["optimizer"].update({f"step/{NAME}": torch.tensor(4.0)}), "is 4.0: at most 3 updates"),
        (lambda s, t: t["random"].clear(), "the random states lack cpu"),
        (lambda s, t: t["random"].update(cpu=t["random"]["cpu"][:-1]), "cpu has the shape"),
        (lambda s, t: t["random"].update(cpu=torch.full_like(t["random"]["cpu"], 255)), "random state cpu is none"),
        (lambda s, t: t["random"].update(gpu=t["random"]["cpu"]), "'gpu' is the random state of none"),
        (lambda s, t: t["random"].update({"cpu/1": t["random"]["cpu"]}), "'cpu/1' is the random state of none"),
    ],
)
def test_each_is_named(changed: Changed, change: Change, said: str) -> None:
    changed.write(change)
    code, answer = changed.resume()
    assert code == 2
    assert file_names.name_of(3) in answer
    assert said in answer
    if said.startswith(("the weights", NAME)):
        code, answer = changed.generate()
        assert code == 2
        assert said in answer


def test_one_of_another_step_than_its_name(changed: Changed) -> None:
    changed.write(lambda state, tensors: None)
    changed.path.rename(changed.path.with_name(file_names.name_of(2)))
    code, answer = changed.resume()
    assert code == 2
    assert "its manifest says step 3" in answer


def test_the_callers_own_error_stays_its_own(changed: Changed) -> None:
    changed.write(lambda state, tensors: None)
    with pytest.raises(ValueError, match="mine") as raised, checkpoint.opened(changed.path):
        raise ValueError("mine")
    assert raised.type is ValueError


def test_the_rule_by_which_text_is_held_out_is_a_boolean(changed: Changed) -> None:
    """It is in the position of few documents only."""
    first = {"by_end": True, "given": 0}
    changed.write(lambda state, tensors: state.update(data={"by_end": [[1]], "given": 0}))
    with (
        checkpoint.opened(changed.path) as saved,
        pytest.raises(checkpoint.DamagedCheckpoint, match=r"data\.by_end = \[\[1\]\]: true or false"),
    ):
        check_content(saved, load(str(changed.place / "tiny.toml")), first, AdamW.state_keys)
