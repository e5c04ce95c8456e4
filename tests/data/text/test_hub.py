import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import text, write_jsonl

from p828.config import Config, DataConfig, MixedSource, ValidationConfig
from p828.data.build import validation_batches
from p828.data.text.hub import hub_shards, pinned
from p828.data.text.open import open_training, open_validation
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError, DataError

README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*
  - split: validation
    path: en/validation-*
- config_name: de
  data_files:
  - split: train
    path: de/train-*
---
"""
TRY = """
import sys
from pathlib import Path
from typing import ClassVar
from p828.data.text.hub import download_tokenizer, hub_shards
from p828.errors import ConfigError
try:
    download_tokenizer(sys.argv[2]) if sys.argv[1] == "tokenizer" else hub_shards(sys.argv[2], "", "train", "text")
except ConfigError as error:
    print(error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Two subsets; the first one's training split has three shards of 5, 6 and 7 documents."""
    root, number = tmp_path / "hub", 0
    for i in range(3):
        ending = ("jsonl.gz", "jsonl.gz", "jsonl.gz")[i]
        write_jsonl(root / f"en/train-0000{i}-of-00003.{ending}", [text(number + k) for k in range(5 + i)])
        number += 5 + i
    write_jsonl(root / "en/validation-00000-of-00001.jsonl.gz", [text(100 + k) for k in range(4)])
    write_jsonl(root / "de/train-00000-of-00001.jsonl", ["eins", "", "zwei"], field="inhalt")
    (root / "README.md").write_text(README)
    return root


def test_shards_subsets_and_splits(hub: Path) -> None:
    shards = hub_shards(str(hub), "en", "train", "text")
    assert [list(shard.documents()) for shard in shards] == [
        [text(i) for i in range(5)],
        [text(i) for i in range(5, 11)],
        [text(i) for i in range(11, 18)],
    ]
    assert list(shards[2].documents(4)) == [text(i) for i in range(15, 18)]
    assert list(hub_shards(str(hub), "de", "train", "inhalt")[0].documents(1)) == ["", "zwei"]


def test_training_resumes_and_validation_is_the_named_split(hub: Path) -> None:
    config = DataConfig(
        source="hf",
        hub_name=str(hub),
        hub_subset="en",
        block_documents=4,
        validation=ValidationConfig(kind="split", split="validation"),
    )
    whole = list(open_training(config, seed=5, epochs=2))
    assert sorted(whole[:18]) == sorted(text(i) for i in range(18))
    assert list(open_validation(config)) == [text(100 + i) for i in range(4)]
    for stop in (3, 4, 17, 18, 25):
        first, second = open_training(config, seed=5, epochs=2), open_training(config, seed=5, epochs=2)
        for _ in range(stop):
            next(first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert list(second) == whole[stop:]


def test_parquet_is_read(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]}).to_parquet(
        str(tmp_path / "data/train-00000-of-00001.parquet")
    )
    (shard,) = hub_shards(str(tmp_path), "", "train", "text")
    assert list(shard.documents(1)) == ["b", "c"]


def test_a_parquet_file_without_rows_holds_no_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, rows in enumerate((["a", "b"], [], ["c"])):
        (tmp_path / "data").mkdir(exist_ok=True)
        table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
        pyarrow.parquet.write_table(table, tmp_path / f"data/train-0000{i}-of-00003.parquet")
    shards = hub_shards(str(tmp_path), "", "train", "text")
    assert [list(shard.documents()) for shard in shards] == [["a", "b"], [], ["c"]]
    assert list(shards[1].documents(1)) == []
    assert not caplog.records  # nothing that looks like an error
    validation = ValidationConfig(fraction=0.3)
    config = DataConfig(source="hf", hub_name=str(tmp_path), validation=validation)
    assert sorted(open_training(config, 0, epochs=1)) == ["a", "b", "c"]  # of one character nothing can be held out


def test_few_documents_of_a_local_directory_have_their_ends_held_out(hub: Path) -> None:
    config = DataConfig(source="hf", hub_name=str(hub), hub_subset="en", validation=ValidationConfig(fraction=0.1))
    training, validation = list(open_training(config, 0, epochs=1)), list(open_validation(config))
    assert sum(map(len, training + validation)) == sum(len(text(i)) for i in range(18))
    assert len(training) == 18


def test_bad_rows_are_passed_over_and_counted(hub: Path) -> None:
    write_jsonl(hub / "de/train-00000-of-00001.jsonl", ["eins", "x" * 1_000_001, "zwei"], field="inhalt")
    config = DataConfig(
        source="hf", hub_name=str(hub), hub_subset="de", text_field="inhalt", bad_records="skip",
        max_document_megabytes=1, validation=ValidationConfig(kind="split", hub_name=str(hub)),
    )  # fmt: skip
    stream = open_training(config, 0, epochs=2)
    assert sorted(stream) == ["eins", "eins", "zwei", "zwei"]
    assert stream.bad_records == 1
    with pytest.raises(DataError, match=r"row 2: more than data\.max_document_megabytes = 1"):
        list(open_training(dataclasses.replace(config, bad_records="stop"), 0, epochs=1))


def test_a_local_directory_has_no_revisions(hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.hub_revision = 'main': .* is a local directory"):
        hub_shards(str(hub), "en", "train", "text", revision="main")
    config = Config(data=DataConfig(source="hf", hub_name=str(hub)))
    assert pinned(config, None) == (config, [])


@pytest.mark.parametrize(
    "subset, split, message",
    [
        ("", "train", r"split 'train': Config name is missing.*'en'.*'de'"),
        ("fr", "train", r"BuilderConfig 'fr' not found\. Available: \['en', 'de'\]"),
        ("en", "valid", r"Bad split: valid\. Available splits: \['train', 'validation'\]"),
    ],
)
def test_unknown_subsets_and_splits_are_named(hub: Path, subset: str, split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        hub_shards(str(hub), subset, split, "text")
    what, advice = str(raised.value).split("\n")
    assert str(hub) in what
    assert "data.hub_subset" in advice


def test_a_name_without_a_last_part_is_no_data_set() -> None:
    with pytest.raises(ConfigError, match="data set /, split 'train'"):
        hub_shards("/", "", "train", "text")


def test_wrong_rows_are_named(hub: Path) -> None:
    (shard,) = hub_shards(str(hub), "de", "train", "text")
    with pytest.raises(DataError, match=r"shard 1 of 1, row 1: no field 'text' \(data\.text_field\); .* id, inhalt"):
        next(shard.documents())
    with pytest.raises(DataError, match=r"row 3: no field"):
        next(shard.documents(2))
    path = hub / "de/train-00000-of-00001.jsonl"
    path.write_text('{"text": "a"}\n{"text": oops}\n')
    (shard,) = hub_shards(str(hub), "de", "train", "text")
    with pytest.raises(DataError, match=r"de split train shard 1 of 1, after row 0: cannot be read"):
        list(shard.documents())


def ask(kind: str, name: str, tmp_path: Path, **environment: str) -> list[str]:
    """The lines of the ConfigError in a process of its own, as the hub's client reads its settings once."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", TRY, kind, name],
        env={**inherited, "HF_HOME": str(tmp_path / "home"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind, advice", [("data", 'data.source = "files"'), ("tokenizer", 'tokenizer.name = "train"')])
def test_a_hub_that_cannot_be_reached(tmp_path: Path, kind: str, advice: str) -> None:
    what, do = ask(kind, "some/name", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    assert "some/name: the Hugging Face hub cannot be reached" in what
    assert "HF_HUB_OFFLINE=1" in do
    assert advice in do


@pytest.mark.parametrize("kind", ["data", "tokenizer"])
def test_offline_with_an_empty_cache(tmp_path: Path, kind: str) -> None:
    what, do = ask(kind, "some/name", tmp_path, HF_HUB_OFFLINE="1")
    assert "some/name" in what
    assert "HF_HUB_OFFLINE=1 with a filled cache" in do


PIN = """
import sys
from dataclasses import replace
from p828.config import Config, DataConfig, MixedSource, ValidationConfig
from p828.data.text.hub import pinned
validation = ValidationConfig(kind="split", hub_name="some/other")
sources = tuple(MixedSource(name=n, source="hf", hub_name=n, hub_revision=r) for n, r in (("a/b", ""), ("c/d", "v1")))
for data in (DataConfig(source="hf", hub_name="some/name", validation=validation), DataConfig(mixture=sources)):
    first, lines = pinned(Config(data=data), None)
    print([s.hub_revision for s in first.data.sources], first.data.validation.hub_revision, lines)
    earlier = replace(first, data=replace(first.data, hub_revision=first.data.hub_revision and "older"))
    again, lines = pinned(Config(data=data), earlier)
    print([s.hub_revision for s in again.data.sources], lines)
    never, lines = pinned(Config(data=data), Config(data=data))
    print([s.hub_revision for s in never.data.sources], lines)
"""


class Repository(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a data set: its commit is its name."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/datasets/").split("?")[0]
        body = json.dumps({"id": name, "sha": f"commit of {name}", "siblings": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_run_keeps_to_the_commit_that_it_began_with(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {
            **inherited, "HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", PIN], env=environment, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    first, again, never, mixed, mixed_again, mixed_never = done.stdout.splitlines()
    assert first == "['commit of some/name'] commit of some/other []"
    assert again.startswith("['older'] ['some/name: the hub has a newer commit, commit of some/name; the run goes on")
    assert never == "[''] []", "a run of an earlier version, which had none"
    assert mixed == "['commit of a/b', 'v1']  []"
    assert mixed_again == "['commit of a/b', 'v1'] []"
    assert mixed_never == "['', 'v1'] []"


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a name that it does not know."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["data", "tokenizer"])
def test_a_name_that_the_hub_does_not_know(tmp_path: Path, kind: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        what, do = ask(kind, "no/such", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert "no/such: the hub has none of this name" in what
    assert "hf auth login" in do


class Model(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a model that has a tokenizer and its settings, and no other file."""

    files: ClassVar = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"chat_template": "x"}'}

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        is_model = self.path.startswith("/api/models/")
        body = json.dumps({"id": "a/b", "sha": "c" * 40}).encode() if is_model else self.files.get(name, b"")
        self.send_response(200 if body else 404)
        for key, value in {"X-Repo-Commit": "c" * 40, "ETag": f'"{name}"', "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        if not body:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_tokenizers_chat_template_comes_with_it(tmp_path: Path) -> None:
    """And again without the network; with a tokenizer alone in the cache it is not known whether there is one."""
    code = "import sys; from p828.data.text.hub import download_tokenizer\n"
    code += "try: print(sorted(p.name for p in download_tokenizer('a/b', sys.argv[1] == 'chat').parent.iterdir()))\n"
    code += "except Exception as error: print(error)"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}

    def found(kind: str, home: str, **environment: str) -> str:
        values = {**inherited, "HF_HOME": str(tmp_path / home), **environment}
        done = subprocess.run([sys.executable, "-c", code, kind], env=values, capture_output=True, text=True)
        return done.stdout

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        assert found("text", "alone", HF_ENDPOINT=endpoint) == "['tokenizer.json']\n"
        both = "['tokenizer.json', 'tokenizer_config.json']\n"
        assert found("chat", "both", HF_ENDPOINT=endpoint) == both
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found("chat", "both", HF_HUB_OFFLINE="1") == both
    assert found("chat", "alone", HF_HUB_OFFLINE="1").startswith("tokenizer_config.json of a/b: ")


def test_a_mixtures_common_split_is_read_once(hub: Path, tokenizer: Tokenizer) -> None:
    """With `validation.hub_name`, all sources have the same validation text."""
    validation = ValidationConfig(kind="split", hub_name=str(hub))
    sources = [MixedSource(name=str(i), source="hf", hub_name=str(hub), hub_subset="en") for i in range(2)]
    data = DataConfig(mixture=tuple(sources), sequence_length=31, validation=validation)
    one = DataConfig(source="hf", hub_name=str(hub), hub_subset="en", sequence_length=31, validation=validation)
    mixed, alone = (validation_batches(d, tokenizer, True, 100, 1) for d in (data, one))
    assert [batch.tokens_BS.tolist() for batch in mixed] == [batch.tokens_BS.tolist() for batch in alone]
