"""Runs whose files hold anything: `p828 runs` has a line for each, `compare` and `batch` an answer in a line or two."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hostile import mutated_bytes, mutated_values, to_json
from hypothesis import given, settings
from hypothesis import strategies as st

from p828.cli.compare import as_lines as as_lines_of_two
from p828.cli.output import printable
from p828.cli.runs import as_lines
from p828.config.files import read_toml
from p828.errors import P828Error
from p828.runs.listing import Listing
from p828.runs.side_by_side import side_by_side
from p828.runs.step_batch import documents_of_step
from p828.runs.summary import summary

OLD = Path(__file__).parents[1] / "data_of_old_versions"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
STATE = Path("checkpoints") / "step_00000005" / "state.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("looking") / "old"
    shutil.copytree(OLD, directory)
    return directory


def mutated(name: str, valid: bytes, draw: Any) -> bytes:
    """The bytes of a file of a run with some of them, or some of its values, changed."""
    if draw(st.booleans()):
        return draw(mutated_bytes(valid))
    if name == "config.toml":
        values = draw(mutated_values(read_toml(OLD / "runs" / "whole-tensors" / name)))
        try:
            return tomli_w.dumps(values).encode()
        except (TypeError, ValueError, AttributeError):  # what TOML cannot say
            return valid
    if name == "metrics.jsonl":
        lines = [json.loads(line) for line in valid.splitlines()]
        return b"\n".join(map(to_json, draw(mutated_values(lines)))) + b"\n"
    return to_json(draw(mutated_values(json.loads(valid))))


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_any_content_is_answered(place: Path, monkeypatch_module: None, data: st.DataObject) -> None:
    run, valid = place / "runs" / "two-ranks", place / "runs" / "whole-tensors"
    name = data.draw(st.sampled_from(["metrics.jsonl", "config.toml", str(STATE)]))
    content = (valid / name).read_bytes()
    shutil.rmtree(run)
    shutil.copytree(valid, run)
    (run / name).write_bytes(mutated(name, content, data.draw))
    found = summary(run)
    json.dumps(found.to_json(), allow_nan=False)
    printable("\n".join(as_lines(Listing([found], []), "runs", data.draw(st.integers(20, 100))))).encode()
    for one, other in ((run, valid), (valid, run)):
        try:
            compared = side_by_side(one, other)
        except P828Error:
            continue
        json.dumps(compared.to_json(), allow_nan=False, default=str)
        printable("\n".join(as_lines_of_two(compared, "a", "b")))
    try:
        batch = documents_of_step(run, data.draw(st.sampled_from([1, 6, 7])))
    except P828Error:
        return
    assert all(row.in_words() for row in batch.rows)


@pytest.fixture(scope="module")
def monkeypatch_module(place: Path) -> Any:
    """The working directory is where the old version's paths lead from."""
    before = Path.cwd()
    os.chdir(place)
    yield
    os.chdir(before)
