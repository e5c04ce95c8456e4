"""Configuration: presets, TOML with bases, and one clear line for everything that is wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p828 import config
from p828.config import Config, data_sections, from_dict, schema, with_steps
from p828.config.facts import changeable, facts_by_key, facts_of, fixed
from p828.config.values import flatten, to_dict
from p828.errors import ConfigError

DOCUMENTED = ["60m", "800m", "fine-grained", "planned", "quickstart"]


def test_presets_are_those_documented() -> None:
    assert config.preset_names() == DOCUMENTED


@pytest.mark.parametrize("preset", DOCUMENTED)
def test_preset_loads_validates_and_round_trips(preset: str) -> None:
    loaded = config.load(preset)
    config.validate(loaded)
    assert loaded.name == preset
    assert config.from_dict(to_dict(loaded), "round trip") == loaded


def test_defaults_validate() -> None:
    config.validate(dataclasses.replace(Config(), name="defaults"))


def test_every_setting_has_help() -> None:
    """The attribute docstrings are the command line's help; each follows its field."""
    files = (schema.__file__, data_sections.__file__)
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    for key in flatten(Config()):
        name = key.rsplit(".", 1)[-1]
        places = [i for i, line in enumerate(lines) if line.startswith(f"    {name}: ")]
        assert places
        assert all(lines[i + 1].startswith('    """') for i in places), key


def test_every_field_states_its_facts() -> None:
    """A field without facts is an error; a number has a range, and what text is made of says if it decides tokens."""
    facts = facts_by_key(Config)
    whole = from_dict({"data": {"mixture": [{"name": "a"}]}}, "test")
    for key, value in {**flatten(Config()), **flatten(whole)}.items():
        assert facts_of(facts, key).has_range == (type(value) in (int, float)), key
        is_of_text = key.startswith(("data.", "tokenizer.", "prepare."))
        assert (facts_of(facts, key).decides_tokens is not None) == is_of_text, key

    @dataclasses.dataclass(frozen=True)
    class Section:
        stated: int = fixed(1, at_least=1)
        unstated: int = 1

    with pytest.raises(KeyError):
        facts_by_key(Section)


def test_what_a_run_with_a_checkpoint_may_change() -> None:
    """Nothing of model, data, tokenizer, the seed and the first weights, but for what is named here; anything else."""
    keys = {key for key, facts in facts_by_key(Config).items() if facts.is_fixed}
    beginnings = ("model.", "data.", "tokenizer.", "train.seed", "train.init_from", "train.upcycle")
    ours = {key for key in facts_by_key(Config) if key.startswith(beginnings)}
    assert keys <= ours
    assert ours - keys == {
        "model.attention_backend", "model.dropout", "model.max_position_embeddings", "model.rope_scaling.factor",
        "model.rope_scaling.original_max_position_embeddings", "model.rope_scaling.beta_fast",
        "model.rope_scaling.beta_slow", "data.prepared", "data.files", "data.validation.files", "data.read_retries",
        "data.bad_records", "data.mixture.prepared", "data.mixture.files", "data.mixture.weights",
        "data.mixture_steps",
    }  # fmt: skip


def test_ranges() -> None:
    @dataclasses.dataclass(frozen=True)
    class Section:
        whole: int = fixed(1, at_least=1)
        few: int = fixed(1, at_least=0, at_most=3)
        positive: float = changeable(1.0, above=0)
        part: float = changeable(0.5, at_least=0, below=1)

    facts, inf = facts_by_key(Section), float("inf")
    accepted = {
        "whole": [1, 2**31 - 1],
        "few": [0, 3],
        "positive": [5e-324, 1e308],
        "part": [0.0, 0.9999999999999999],
    }
    refused = {
        "whole": [0, -1, 2**31, 10**400],
        "few": [-1, 4],
        "positive": [0.0, inf, -inf, float("nan")],
        "part": [-5e-324, 1.0, inf, float("nan")],
    }
    for name, fact in facts.items():
        assert all(map(fact.accepts, accepted[name])), name
        assert not any(map(fact.accepts, refused[name])), name
    assert facts["few"].accepted(int) == "a whole number from 0 to 3"
    assert facts["whole"].accepted(int) == "a whole number from 1 to 2147483647"
    assert facts["positive"].accepted(float) == "a number above 0"
    assert facts["part"].accepted(float) == "a fraction from 0 to below 1"


def test_derived_values() -> None:
    loaded = config.load("60m")
    assert loaded.run_dir == Path("runs/60m")
    assert loaded.tokens_per_step == 8 * 16 * 2048


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_base_is_changed_only_where_listed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.toml", 'base = "quickstart"\n[model]\nhidden_size = 128\n[optimizer]\nbetas = [0, 0.5]\n'
    )
    mine, base = config.load(path), config.load("quickstart")
    assert mine.name == "mine"
    assert (mine.model.hidden_size, mine.optimizer.betas) == (128, (0.0, 0.5))
    assert dataclasses.replace(mine.model, hidden_size=base.model.hidden_size) == base.model
    assert mine.data == base.data


def test_base_beside_the_file_and_in_a_chain(tmp_path: Path) -> None:
    write(tmp_path / "one.toml", "[model]\nnum_hidden_layers = 5\n[train]\nseed = 1\nsteps = 7\n")
    write(tmp_path / "two.toml", 'base = "one.toml"\n[train]\nseed = 2\n')
    three = config.load(
        write(tmp_path / "three.toml", 'name = "x"\nbase = "two.toml"\n[model.rope_scaling]\nfactor = 2\n')
    )
    assert (three.name, three.train.seed, three.train.steps) == ("x", 2, 7)
    assert (three.model.num_hidden_layers, three.model.rope_scaling.factor) == (5, 2.0)
    assert isinstance(three.model.rope_scaling.factor, float)


def test_whole_configuration_survives_toml(tmp_path: Path) -> None:
    tomli_w = pytest.importorskip("tomli_w")
    loaded = config.load("800m")
    assert config.load(write(tmp_path / "again.toml", tomli_w.dumps(to_dict(loaded)))) == loaded


def message_of(values: dict[str, Any]) -> str:
    """What a user reads who changes `values` (dotted keys) in an otherwise valid configuration."""
    nested: dict[str, Any] = {"name": "test"}
    for key, value in values.items():
        *tables, last = key.split(".")
        table = nested
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
    with pytest.raises(ConfigError) as error:
        config.validate(config.from_dict(nested, "test.toml"))
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


NAN, INF = float("nan"), float("inf")
# What is wrong, and what the message must say: the key, what was given, what is accepted.
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"model.hiden_size": 5}, ["unknown key model.hiden_size", "did you mean model.hidden_size?"]),
    ({"modle": {}}, ["unknown key modle", "did you mean model?"]),
    ({"model.rope_scaling.factr": 2}, ["model.rope_scaling.factr", "did you mean model.rope_scaling.factor?"]),
    ({"data.zzz": 5}, ["unknown key data.zzz", "sequence_length"]),
    ({"model.hidden_size": "512"}, ["model.hidden_size = '512'", "a whole number"]),
    ({"model.hidden_size": 512.0}, ["model.hidden_size = 512.0", "a whole number"]),
    ({"model.hidden_size": True}, ["model.hidden_size = true", "a whole number"]),
    ({"optimizer.learning_rate": False}, ["optimizer.learning_rate = false", "a number"]),
    ({"optimizer.learning_rate": "3e-4"}, ["optimizer.learning_rate = '3e-4'", "a number"]),
    ({"optimizer.learning_rate": 10**400}, ["optimizer.learning_rate", "a number"]),
    ({"model.attention_sinks": 1}, ["model.attention_sinks = 1", "true or false"]),
    ({"tokenizer.name": 5}, ["tokenizer.name = 5", "text in quotes"]),
    ({"data.files": "*.py"}, ["data.files = '*.py'", "a list of texts"]),
    ({"data.files": ["*.py", 5]}, ["data.files[1] = 5", "text in quotes"]),
    ({"optimizer.betas": [0.9]}, ["optimizer.betas = [0.9]", "a list of 2 numbers"]),
    ({"optimizer.betas": [0.9, 1.0]}, ["optimizer.betas = [0.9, 1.0]", "below 1"]),
    ({"optimizer.betas": [NAN, 0.9]}, ["optimizer.betas", "below 1"]),
    (
        {"engine": "deepspeed", "optimizer.moment_dtype": "bfloat16"},
        ['optimizer.moment_dtype = "bfloat16": with engine = "deepspeed", "auto" or "float32" is accepted'],
    ),
    *(({"sharded.stage": stage}, [f"sharded.stage = {stage}", "a whole number from 1 to 3"]) for stage in (0, 4)),
    ({"model": 5}, ["model = 5", "[model]"]),
    ({"model.rope_scaling": [1]}, ["model.rope_scaling = [1]", "[model.rope_scaling]"]),
    ({"model.scoring_func": "relu"}, ["model.scoring_func = 'relu'", "sigmoid", "softmax"]),
    ({"model.scoring_func": "sigmoit"}, ["did you mean sigmoid?"]),
    ({"model.scoring_func": ["sigmoid"]}, ["model.scoring_func = ['sigmoid']", "sigmoid"]),
    ({"model.num_key_value_heads": 3}, ["model.num_key_value_heads = 3", "divide model.num_attention_heads = 8"]),
    ({"model.num_key_value_heads": 16}, ["model.num_key_value_heads = 16", "divide model.num_attention_heads = 8"]),
    ({"model.head_dim": 7}, ["model.head_dim = 7", "even"]),
    ({"model.num_experts_per_tok": 5}, ["model.num_experts_per_tok = 5", "at most model.n_routed_experts = 4"]),
    ({"data.mixture_steps": [0, 5]}, ["data.mixture_steps"]),
    ({"data.prepared": "x", "data.mixture": [{"name": "a", "weights": [1.0]}]}, ["data.prepared", "data.mixture"]),
    ({"prepare.min_characters": 9, "prepare.max_characters": 8}, ["prepare.max_characters"]),
    ({"model.n_group": 3}, ["model.n_group = 3", "divide model.n_routed_experts = 4"]),
    ({"model.n_group": 4}, ["model.n_group = 4", "at most 2 groups"]),
    ({"model.topk_group": 2}, ["model.topk_group = 2", "at most model.n_group = 1"]),
    (
        {"model.n_group": 2, "model.topk_group": 1, "model.num_experts_per_tok": 3},
        ["model.num_experts_per_tok = 3", "at most 2", "model.topk_group"],
    ),
    ({"model.dropout": 1.0}, ["model.dropout = 1.0", "below 1"]),
    ({"model.dropout": -0.1}, ["model.dropout = -0.1", "below 1"]),
    ({"model.rope_theta": 1.0}, ["model.rope_theta = 1.0", "above 1"]),
    ({"model.rope_scaling.factor": 0.5}, ["model.rope_scaling.factor = 0.5", "at least 1"]),
    ({"model.rope_scaling.beta_slow": 40}, ["model.rope_scaling.beta_slow = 40.0", "below", "beta_fast = 32.0"]),
    ({"model.hidden_size": 0}, ["model.hidden_size = 0", "from 1"]),
    ({"model.hidden_size": -512}, ["model.hidden_size = -512", "from 1"]),
    ({"model.hidden_size": 2**31}, ["model.hidden_size = 2147483648", "2147483647"]),
    ({"train.steps": 10**30}, ["train.steps", "2147483647"]),
    ({"train.seed": -1}, ["train.seed = -1", "from 0"]),
    ({"optimizer.learning_rate": NAN}, ["optimizer.learning_rate = nan", "above 0"]),
    ({"optimizer.learning_rate": INF}, ["optimizer.learning_rate = inf", "above 0"]),
    ({"optimizer.learning_rate": -1e-3}, ["optimizer.learning_rate = -0.001", "above 0"]),
    ({"optimizer.learning_rate": 0}, ["optimizer.learning_rate = 0.0", "above 0"]),
    ({"optimizer.weight_decay": -0.1}, ["optimizer.weight_decay = -0.1", "at least 0"]),
    ({"optimizer.weight_decay": INF}, ["optimizer.weight_decay = inf", "at least 0"]),
    ({"schedule.min_lr_ratio": 1.5}, ["schedule.min_lr_ratio = 1.5", "from 0 to 1"]),
    ({"evaluation.temperature": NAN}, ["evaluation.temperature = nan", "at least 0"]),
    ({"data.sequence_length": 5000}, ["data.sequence_length = 5000", "at most model.max_position_embeddings = 4096"]),
    ({"data.source": "files"}, ["data.files", "at least one glob"]),
    ({"data.source": "hf"}, ["data.hub_name", "name"]),
    ({"data.validation.kind": "files"}, ["data.validation.files", "at least one glob"]),
    ({"data.validation.kind": "split"}, ["data.validation.kind", "data.validation.hub_name"]),
    ({"data.validation.fraction": 0.0}, ["data.validation.fraction = 0.0", "between 0 and 1"]),
    ({"tokenizer.eos_token": ""}, ["tokenizer.eos_token = ''", "at least two characters"]),
    ({"tokenizer.eos_token": "e"}, ["tokenizer.eos_token = 'e'", "at least two characters"]),
    ({"tokenizer.vocab_size": 256}, ["tokenizer.vocab_size = 256", "at least 257"]),
    (
        {"schedule.kind": "wsd", "schedule.decay_steps": 9, "train.steps": 2005},
        ["schedule.decay_steps = 9", "train.steps = 2005"],
    ),
    ({"tokenizer.eos_token": ""}, ["tokenizer.eos_token = ''", "two characters"]),
    ({"tokenizer.eos_token": "e"}, ["tokenizer.eos_token = 'e'", "two characters"]),
    ({"runs_dir": "a\0b"}, ["runs_dir = 'a\\x00b'", "NUL"]),
    ({"data.prepared": "x" * 5000}, ["data.prepared = 'xxx", "3,500 bytes"]),
    ({"data.files": ["a", "x" * 300]}, ["data.files = 'xxx", "255 bytes between two slashes"]),
    ({"data.validation.files": ["é\0"]}, ["data.validation.files = 'é\\x00'"]),
    ({"tokenizer.name": "/".join(["x" * 100] * 50)}, ["tokenizer.name = 'xxx", "3,500 bytes"]),
    ({"data.mixture": [{"name": "a", "source": "hf", "hub_name": "x\0"}]}, ["data.mixture[0].hub_name", "NUL"]),
    ({"deepspeed.config": "\0"}, ["deepspeed.config", "NUL"]),
    ({"evaluation.prompts": ["a" * 2**25]}, ["33,5", "at most 33,554,432"]),
    ({"name": "a/b"}, ["name = 'a/b'", "directory"]),
    ({"name": ""}, ["name = ''", "directory"]),
    ({"name": ".."}, ["name = '..'", "directory"]),
]


@pytest.mark.parametrize("values, says", WRONG, ids=[f"{'+'.join(v)}-{i}" for i, (v, _) in enumerate(WRONG)])
def test_wrong_values(values: dict[str, Any], says: list[str]) -> None:
    message = message_of(values)
    for part in says:
        assert part in message, message


def test_every_number_has_a_range() -> None:
    """No number of the configuration takes NaN, infinity or a negative value."""
    for key, value in flatten(Config()).items():
        bad = [-1] if type(value) is int else [NAN, INF, -INF, -1.0] if isinstance(value, float) else []
        for number in bad:
            assert key in message_of({key: number})


def test_limits_themselves_are_accepted() -> None:
    values: dict[str, Any] = {
        "model": {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 4, "num_key_value_heads": 8, "dropout": 0},
        "data": {"sequence_length": 4096},
        "schedule": {"warmup_steps": 0, "min_lr_ratio": 0, "kind": "wsd", "decay_steps": 5},
        "train": {"steps": 5, "seed": 0},
        "optimizer": {"betas": [0, 0.999], "weight_decay": 0},
        "balance": {"update_rate": 0},
        "tokenizer": {"vocab_size": 257},
    }
    config.validate(config.from_dict({"name": "limits", **values}, "test.toml"))


FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "broken TOML": ("[model\n", ["wrong.toml", "TOML", "line 1"]),
    "key twice": ("name = 'a'\nname = 'b'\n", ["wrong.toml", "TOML"]),
    "not UTF-8": (b"name = '\xff'\n", ["wrong.toml", "TOML"]),
    "a number of 5000 digits": (f"[train]\nsteps = {'1' * 5000}\n", ["wrong.toml"]),
    "unknown base": ('base = "quikstart"\n', ["no preset 'quikstart'", "did you mean quickstart?"]),
    "missing base": ('base = "gone.toml"\n', ["no file", "gone.toml"]),
    "base of another type": ("base = 5\n", ["wrong.toml", "base = 5", "preset"]),
    "base of itself": ('base = "wrong.toml"\n', ["wrong.toml", "base = 'wrong.toml'", "8 deep"]),
    "unknown key": ("[model]\nhiden_size = 5\n", ["wrong.toml", "model.hiden_size"]),
    "table for a value": ("[model.hidden_size]\nx = 1\n", ["wrong.toml", "model.hidden_size", "a whole number"]),
    "value for a table": ('model = "60m"\n', ["wrong.toml", "model = '60m'", "[model]"]),
    "UTF-16": ("name = 'a'\n".encode("utf-16"), ["wrong.toml", "UTF-16", "UTF-8"]),
    "UTF-16 without a mark": ("name = 'a'\n".encode("utf-16-le"), ["wrong.toml", "UTF-16", "UTF-8"]),
    "Latin-1": ("# one\nname = 'é'\n".encode("latin-1"), ["wrong.toml", "line 2", "0xe9", "UTF-8"]),
    "many dots": (f"a{'.a' * 300} = 1\n", ["wrong.toml", "200 dots"]),
    "many dots behind a text of lines": ('x = {a = """\n""", b' + ".b" * 300 + ' = ""}\n', ["200 dots"]),
    "many dots in a table": (f"[a{'.a' * 300}]\n", ["wrong.toml", "200 dots"]),
    "date": ("[train]\nsteps = 2020-01-01\n", ["train.steps", "a whole number"]),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    content, says = FILES[case]
    path = tmp_path / "wrong.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        config.load(str(path))
    message = str(error.value)
    assert "\n" not in message
    for part in says:
        assert part in message, message


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b'base = "quickstart"\n')
    assert config.load(str(path)).model == config.load("quickstart").model


NAMES = [
    "plain.txt", "[x] {y}*.txt", "'", '"', "'''", '"""', "back\\slash", "new\nline", "tab\t", "\x7f\x01", "é 🙂 漢",
    "\u2028", "#", ".".join("a" * 120), "'" + "." * 250, "'''" + "." * 240, "C:\\Temp\\x", " = ", "# . '",
]  # fmt: skip


@pytest.mark.parametrize("in_mixture", [False, True])
def test_whatever_is_written_can_be_read(tmp_path: Path, in_mixture: bool) -> None:
    tomli_w = pytest.importorskip("tomli_w")
    files = [f"{name}/{i:05}" for name in NAMES for i in range(300)]
    data = {"mixture": [{"name": "a", "source": "files", "files": files}]} if in_mixture else {"files": files}
    loaded = config.from_dict({"name": "many", "evaluation": {"prompts": NAMES}, "data": data}, "many")
    config.validate(loaded)
    assert config.load(write(tmp_path / "many.toml", tomli_w.dumps(to_dict(loaded)))) == loaded


def test_a_hundred_thousand_file_names(tmp_path: Path) -> None:
    tomli_w = pytest.importorskip("tomli_w")
    files = [f"/data/corpus/part-{i:07}.jsonl.zst" for i in range(100_000)]
    loaded = config.from_dict({"name": "many", "data": {"source": "files", "files": files}}, "many")
    config.validate(loaded)
    assert config.load(write(tmp_path / "many.toml", tomli_w.dumps(to_dict(loaded)))) == loaded


def test_a_cycle_of_bases_ends(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'base = "b.toml"\n')
    write(tmp_path / "b.toml", 'base = "a.toml"\n')
    with pytest.raises(ConfigError, match="8 deep"):
        config.load(str(tmp_path / "a.toml"))


@pytest.mark.parametrize("name", ["60mm", "x" * 300, "", "nested/60m"])
def test_unknown_preset(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no preset .* Presets: 60m, 800m, .*\.toml file"):
        config.load(name)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*gone\.toml"):
        config.load(str(tmp_path / "gone.toml"))
    (tmp_path / "dir.toml").mkdir()
    with pytest.raises(ConfigError, match=r"dir\.toml"):
        config.load(str(tmp_path / "dir.toml"))


def test_configuration_is_read_without_torch() -> None:
    code = """
import sys
from p828 import config
from p828.model.costs import count_parameters
config.validate(config.load("quickstart"))
count_parameters(config.load("60m").model)
print(sorted({"torch", "numpy", "datasets", "wandb"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tokens_are_rounded_up_to_whole_steps_of_all_ranks() -> None:
    config = from_dict({"train": {"tokens": 5e9, "steps": 7}}, "test")
    assert config.tokens_per_step == 8 * 16 * 2048
    found = with_steps(config, 4).train
    assert (found.steps, found.tokens) == (4769, 0)  # 4768.4
    assert with_steps(with_steps(config, 4), 1).train == found
    assert with_steps(from_dict({"train": {"steps": 7}}, "test"), 4).train.steps == 7
