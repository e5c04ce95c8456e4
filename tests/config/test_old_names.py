"""Keys of the configuration that were renamed: files, flags, runs and prepared data with old names keep working."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from p828 import config
from p828.cli.main import dispatch
from p828.config import Config, from_dict
from p828.config.facts import facts_by_key
from p828.config.old_names import renamed, under_old_names
from p828.config.values import flatten, to_dict
from p828.data.tokens.directory import settings
from p828.data.tokens.format import CHECKSUM, INDENT, open_manifest, write_sealed
from p828.errors import ConfigError
from runs import write_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The config.toml of a run before the first rename, every key of it with a value that is not its default.
OLD_RUN = """# p828 0.1.0, torch 2.8.0, Python 3.12.3

name = "old"
runs_dir = "other-runs_dir"
engine = "deepspeed"

[model]
vocab_size = 1
hidden_size = 513
moe_intermediate_size = 769
num_hidden_layers = 2
num_attention_heads = 9
num_key_value_heads = 3
head_dim = 65
use_qk_norm = true
attention_sinks = false
attention_backend = "flash"
mask_documents = false
max_position_embeddings = 4097
rope_theta = 20000.0
n_routed_experts = 5
n_shared_experts = 2
num_experts_per_tok = 3
n_group = 2
topk_group = 2
scoring_func = "softmax"
norm_topk_prob = false
routed_scaling_factor = 2.0
hidden_act = "swiglu_of_product"
dropout = 0.25
rms_norm_eps = 2e-05
tie_word_embeddings = true
initializer_range = 0.04

[model.rope_scaling]
factor = 2.0
original_max_position_embeddings = 2049
beta_fast = 64.0
beta_slow = 2.0

[data]
prepared = "other-prepared"
source = "hf"
files = ["a", "b"]
text_field = "other-text_field"
hub_name = "other-hub_name"
hub_subset = "other-hub_subset"
hub_revision = "other-hub_revision"
hub_split = "other-hub_split"
mixture_steps = [0, 10]
sequence_length = 2049
packing = "best_fit"
streams = 2
block_documents = 1025
shuffle_rows = 1025
read_retries = 7
bad_records = "skip"
max_document_megabytes = 17

[[data.mixture]]
prepared = "other-prepared"
source = "hf"
files = ["a", "b"]
text_field = "other-text_field"
hub_name = "other-hub_name"
hub_subset = "other-hub_subset"
hub_revision = "other-hub_revision"
hub_split = "other-hub_split"
name = "other-name"
weights = [1.0, 0.5]

[data.validation]
kind = "files"
share = 0.02
files = ["a", "b"]
hub_name = "other-hub_name"
hub_revision = "other-hub_revision"
split = "other-split"

[prepare]
min_characters = 1
max_characters = 1
drop_duplicates = true
only_code = true
shard_tokens = 100000001

[tokenizer]
name = "other-name"
vocab_size = 4097
training_megabytes = 65
eos_token = "other-eos_token"

[optimizer]
learning_rate = 0.0006
betas = [0.8, 0.99]
eps = 2e-08
weight_decay = 0.02
decay_embeddings = true
max_grad_norm = 2.0
moment_dtype = "bfloat16"

[schedule]
kind = "wsd"
warmup_steps = 2001
decay_steps = 1
min_lr_ratio = 0.2

[balance]
update_rate = 0.002
sequence_loss_weight = 0.25
z_loss_weight = 0.25

[train]
steps = 100001
tokens = 0.25
hours = 0.25
micro_batch_size = 9
gradient_accumulation = 17
seed = 1
device = "cuda"
dtype = "bfloat16"
compile = "off"
gradient_checkpointing = true
deterministic = true

[evaluation]
every = 501
rows = 65
prompts = ["a", "b"]
max_new_tokens = 65
temperature = 1.6
patience = 1
bigram_baseline = true

[checkpoint]
every = 1001
keep_last = 4

[rollback]
after_steps = 1
spike_nats = 2.0
limit = 4

[deepspeed]
config = "other-config"
stage = 2
offload_optimizer = "cpu"
offload_param = "cpu"
reduce_bucket_size = 50000001
allgather_bucket_size = 500000001
overlap_comm = false
timeout_seconds = 1801

[wandb]
mode = "offline"
project = "other-project"
"""
TODAY = {"data.validation.share": "data.validation.fraction", "rollback.spike_nats": "rollback.spike_threshold"}
OLD_KEYS = "[data.validation]\nshare = 0.2\n[rollback]\nafter_steps = 2\nspike_nats = 0.5\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of nested tables, apart from p828's own way of doing that."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, table in enumerate(value):
                found |= flat(table, f"{prefix}{name}[{i}].")
        else:
            found[prefix + name] = value
    return found


def test_every_key_of_an_old_runs_configuration_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.toml").write_text(OLD_RUN)
    loaded, unset = flatten(config.load("run/config.toml")), flatten(Config())
    for key, value in flat(tomllib.loads(OLD_RUN)).items():
        today = TODAY.get(key, key)
        found = loaded[today]
        assert (list(found) if isinstance(found, tuple) else found) == value, key
        assert unset.get(today) != found, f"{key} must not have its default here"
    assert flatten(config.load("run")) == loaded | {"name": "run", "runs_dir": "."}
    assert capsys.readouterr() == ("", ""), "nobody is told of old names in a file that p828 wrote"


def test_the_renames_are_these() -> None:
    """A key that is renamed comes to stand here, with its old name in `OLD_RUN`."""
    found = {
        key.rpartition(".")[0] + f".{facts.old_name}": key
        for key, facts in facts_by_key(Config).items()
        if facts.old_name
    }
    assert found == TODAY


def test_old_names_and_back() -> None:
    values = from_dict({"data": {"validation": {"share": 0.25}, "mixture": [{"name": "a"}]}}, "test")
    assert values.data.validation.fraction == 0.25
    old = under_old_names(Config, to_dict(values))
    assert flat(old)["data.validation.share"] == 0.25
    assert renamed(Config, old, "test") == (to_dict(values), TODAY)
    assert renamed(Config, to_dict(values), "test") == (to_dict(values), {})
    assert renamed(Config, {"data": 5, "rollback": [1], "x": {}}, "test") == ({"data": 5, "rollback": [1], "x": {}}, {})


def test_a_file_with_old_names_is_told_the_new_ones(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.toml").write_text('base = "quickstart"\n' + OLD_KEYS)
    Path("mine.toml").write_text('base = "base.toml"\n[data.validation]\nfraction = 0.3\n')
    assert dispatch(["train", "mine.toml", "--dry-run"]) == 0
    out, told = capsys.readouterr()
    assert told.splitlines() == [
        "p828: base.toml: data.validation.share is now data.validation.fraction",
        "p828: base.toml: rollback.spike_nats is now rollback.spike_threshold",
    ]
    assert "fraction = 0.3" in out
    assert "spike_threshold = 0.5" in out
    Path("whole.toml").write_text(out.replace("fraction = ", "share = "))
    assert config.load("whole.toml").data.validation.fraction == 0.3
    assert capsys.readouterr().err == "p828: whole.toml: data.validation.share is now data.validation.fraction\n"


def test_an_old_name_implies_what_the_new_one_does(here: Path) -> None:
    Path("mine.toml").write_text('base = "60m"\n[data.validation]\nshare = 0.2\n')
    assert config.load("60m").data.validation.kind != "held_out"
    assert config.load("mine.toml").data.validation.kind == "held_out"


def test_a_value_under_both_names_is_refused(here: Path) -> None:
    Path("mine.toml").write_text("[data.validation]\nshare = 0.2\nfraction = 0.2\n")
    with pytest.raises(
        ConfigError, match=r"mine\.toml: data\.validation\.share and data\.validation\.fraction are both"
    ):
        config.load("mine.toml")


@pytest.mark.parametrize("flag", [["--rollback.spike-nats", "0.5"], ["--rollback.spike_nats=0.5"]])
def test_old_flags(flag: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "quickstart", "--rollback.after-steps", "2", *flag, *flag, "--dry-run"]
    assert dispatch(arguments) == 0
    out, told = capsys.readouterr()
    assert told == "p828: --rollback.spike-nats is now --rollback.spike-threshold\n"
    assert "spike_threshold = 0.5" in out
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dispatch(arguments) == 0
    assert capsys.readouterr().err == "", "one process of a run tells it"


def test_an_old_flag_that_changes_nothing_is_refused_by_its_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", "quickstart", "--rollback.spike-nats", "0.5"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[1] == "p828: rollback.spike_threshold = 0.5: accepted with rollback.after_steps above 0"


def test_what_prepared_data_keeps_of_its_configuration() -> None:
    """The same settings as before the first rename, so that data prepared then is still the data of a configuration."""
    kept = settings(from_dict({"data": {"packing": "best_fit", "validation": {"hub_revision": "x"}}}, "test"))
    assert under_old_names(Config, kept) == {
        "data": {
            "source": "python", "files": [], "text_field": "text", "hub_name": "", "hub_subset": "",
            "hub_split": "train", "packing": "best_fit", "sequence_length": 2048, "max_document_megabytes": 16,
            "validation": {
                "kind": "held_out", "share": 0.01, "files": [], "hub_name": "", "hub_revision": "x",
                "split": "validation",
            },
        },
        "tokenizer": {"name": "train", "vocab_size": 4096, "training_megabytes": 64, "eos_token": "<|endoftext|>"},
        "prepare": {
            "min_characters": 0, "max_characters": 0, "drop_duplicates": False, "only_code": False,
            "shard_tokens": 100_000_000,
        },
    }  # fmt: skip
    plain = settings(Config())["data"]
    assert "sequence_length" not in plain
    assert "hub_revision" not in plain["validation"]


def test_data_prepared_under_old_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is complete, it is trained on, and a run goes on from it to what is prepared anew and back."""
    path = str(write_toml(here, train={"steps": 2}, evaluation={"every": 0, "prompts": []}))
    for name in ("old", "new"):
        assert dispatch(["prepare", path, "--data.prepared", name]) == 0
    manifest = json.loads((here / "old" / "manifest.json").read_bytes())
    del manifest[CHECKSUM]
    validation = manifest["settings"]["data"]["validation"]
    validation["share"] = validation.pop("fraction")
    write_sealed(here / "old" / "manifest.json", manifest, INDENT)
    assert open_manifest(here / "old").settings != open_manifest(here / "new").settings
    capsys.readouterr()
    assert dispatch(["prepare", path, "--data.prepared", "old"]) == 0, capsys.readouterr().err
    for steps, name in ((2, "old"), (3, "new"), (4, "old")):
        arguments = ["train", path, "--data.prepared", name, "--train.steps", str(steps)]
        assert dispatch(arguments) == 0, capsys.readouterr().err
    flags = ["--data.prepared", "old", "--data.validation.fraction", "0.3"]
    assert dispatch(["prepare", path, *flags]) == 2
    assert "'fraction': 0.2" in capsys.readouterr().err
