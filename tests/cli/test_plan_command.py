"""`p828 plan` as a user calls it."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from p828.cli.plan import _rate_of_run, run
from p828.config import ShardedConfig, load
from p828.config.values import to_dict
from p828.data.tokens.format import open_manifest
from p828.errors import ConfigError
from runs import write_toml

OLD = Path(__file__).parents[1] / "data_of_old_versions"
OLD_RUNS, OLD_PREPARED = OLD / "runs", OLD / "prepared"
WIDTH = 80


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    run(list(arguments))
    return capsys.readouterr().out


def test_it_needs_no_pytorch() -> None:
    program = (
        "import sys; from p828.cli.main import dispatch; dispatch(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "800m", "--gpus", "8"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ZeRO 3" in done.stdout


def test_planned_is_told_to_be_4_4_billion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "4.38 B parameters, 1.66 B active" in shown(capsys, "planned")


def test_the_documented_plan_is_today_s(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    documented = text.partition("$ p828 plan 800m --gpus 2\n")[2].partition("\n```")[0]
    assert documented + "\n" == shown(capsys, "800m", "--gpus", "2")


@pytest.mark.parametrize(
    "arguments",
    [
        ("800m",),
        ("planned", "--gpus", "1000000", "--gpu", "4090"),
        ("quickstart", "--gpu", "rtx-5090", "--train.micro_batch_size", "8", "--kilowatt-hour-price", "0.3"),
        ("fine-grained", "--model.hidden_size", "8192", "--model.num-hidden-layers", "96"),
    ],
)
def test_it_fits_a_terminal(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    lines = shown(capsys, *arguments).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert any("advice" in line for line in lines)


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(shown(capsys, "800m", "--gpus", "2", "--gpu-hour-price", "2", "--json"))
    assert [engine["stage"] for engine in plan["engines"]] == [None, 1, 2, 3]
    for engine in plan["engines"]:
        memory = engine["memory_bytes"]
        assert memory.pop("total") == sum(memory.values())
    assert plan["cost"] == pytest.approx(2 * 2 * plan["hours"])
    assert plan["advice"]["setup"]["stage"] == 1
    assert "2e-3" in plan["advice"]["sentence"] or "0.002" in plan["advice"]["sentence"]
    assert sum(plan["parameters"]["by_part"].values()) == plan["parameters"]["total"]


def test_hosts_that_each_have_a_replica(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory is that of one host's GPUs, and hosts send the same at each stage."""
    flags = ("800m", "--gpus", "16", "--hosts", "2", "--engine", "sharded")
    over_all, within = (
        json.loads(shown(capsys, *flags, "--sharded.shard-within", name, "--json"))["engines"][1:]
        for name in ("all", "host")
    )
    assert [engine["shards"] for engine in (*over_all, *within)] == [16] * 3 + [8] * 3
    moments = [[engine["memory_bytes"]["moments"] for engine in engines] for engines in (over_all, within)]
    assert moments[1] == [pytest.approx(2 * size, rel=0.01) for size in moments[0]]
    assert len({engine["host_link_bytes_a_step"] for engine in within}) == 1
    assert "that share a replica" in shown(capsys, *flags)


@pytest.mark.parametrize(
    "flags, engine, stage",
    [
        (("--sharded.stage", "3"), "sharded", 3),
        (("--deepspeed.stage", "2"), "deepspeed", 2),
        (("--deepspeed.config", "zero2"), "deepspeed", 2),
        (("--sharded.shard-within", "host", "--hosts", "2"), "sharded", 1),
    ],
)
def test_settings_of_an_engine_choose_it_as_in_training(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], engine: str, stage: int
) -> None:
    configured = json.loads(shown(capsys, "800m", "--gpus", "8", *flags, "--json"))["configured"]
    assert (configured["engine"], configured["stage"]) == (engine, stage)


@pytest.mark.parametrize("gpus, stage", [("1", None), ("4", 1), ("8", 3)])
def test_a_stage_that_training_chose_is_planned_for_as_many_gpus_and_chosen_for_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gpus: str, stage: int | None
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    chosen = dataclasses.replace(load("800m"), engine="sharded", sharded=ShardedConfig(stage=3, stage_chosen_for=8))
    (directory / "config.toml").write_text(tomli_w.dumps(to_dict(chosen)))
    plan = json.loads(shown(capsys, str(directory), "--gpus", gpus, "--json"))
    assert plan["configured"]["stage"] == stage
    assert plan["gradient_accumulation"] == chosen.train.gradient_accumulation, "each GPU's, as in training"


def test_a_rate_outside_the_fit_is_not_in_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--optimizer.learning-rate" not in shown(capsys, "quickstart")
    assert "--optimizer.learning-rate" not in shown(capsys, "800m")
    within = ("800m", "--train.micro_batch_size", "8", "--train.gradient-accumulation", "32", "--train.steps", "20000")
    assert "--optimizer.learning-rate" in shown(capsys, *within, "--data.sequence-length", "1024")


def test_a_short_time_is_not_told_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "quickstart", "--train.steps", "1", "--schedule.warmup-steps", "0")
    seconds = re.search(r"^time +(\S+) seconds", out, re.MULTILINE)
    assert seconds is not None, out
    assert 0 < float(seconds[1]) < 1


def test_epochs_of_local_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(tmp_path, train={"device": "auto"})
    size = sum(file.stat().st_size for file in (tmp_path / "text").iterdir())
    (source,) = json.loads(shown(capsys, str(path), "--json"))["sources"]
    assert source["tokens"] == pytest.approx(0.8 * size / 2.7)
    assert source["epochs"] == pytest.approx(12 * 2 * 2 * 32 / source["tokens"])
    many = shown(capsys, str(path), "--train.steps", str(round(400 * 12 / source["epochs"])))
    assert re.search(r"gone\s+through\s+400\s+times,\s+above\s+4", many), many
    path = write_toml(tmp_path, train={"device": "auto"}, data={"files": ["nowhere/*.txt"]})
    (source,) = json.loads(shown(capsys, str(path), "--json"))["sources"]
    assert source["tokens"] is None
    assert "nowhere" in source["how"]


def test_epochs_of_prepared_data(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = json.loads(shown(capsys, "quickstart", "--data.prepared", str(OLD_PREPARED), "--json"))["sources"]
    counted = sum(shard.tokens for shard in open_manifest(OLD_PREPARED).training)
    assert (source["tokens"], source["how"]) == (counted, "counted when prepared")
    assert source["epochs"] == 3000 * 1024 / counted


@pytest.mark.parametrize("directory", sorted(OLD_RUNS.iterdir()), ids=lambda directory: directory.name)
def test_a_run_of_an_older_version(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    text = shown(capsys, str(directory), "--train.device", "auto", "--train.dtype", "auto")
    assert "advice" in text


def test_a_run_s_measured_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The median of its last hundred steps."""
    path = write_toml(tmp_path, train={"device": "auto"})
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.toml").write_text(path.read_text())
    records = [{"kind": "step", "step": step, "mfu": 0.1 if step < 50 else 0.33} for step in range(1, 151)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rate = json.loads(shown(capsys, str(directory), "--json"))["rate"]
    assert rate == {"share_of_datasheet": 0.33, "from": "measured in this run"}
    rate = json.loads(shown(capsys, str(directory), "--json", "--mfu", "0.5"))["rate"]
    assert rate == {"share_of_datasheet": 0.5, "from": "as given"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("800m", "--gpu", "h10"), r"--gpu h10; did you mean h100\?"),
        (("800m", "--gpus", "0"), "--gpus 0: a whole number from 1 is accepted"),
        (("800m", "--gpus", "8", "--hosts", "3"), "--hosts 3: a whole number that divides --gpus 8 is accepted"),
        (("800m", "--mfu", "47"), r"--mfu 47.0: a share between 0 and 1 is accepted"),
        (("800m", "--gpu-hour-price", "-1"), "--gpu-hour-price -1.0: a number of at least 0"),
        (("800m", "--gpus", "2", "--engine", "plain"), 'engine = "plain" trains on one device, not on 2: give'),
        (("800m", "--sharded.stage", "3"), 'sharded.stage = 3: accepted with engine = "sharded"'),
        (("800m", "--model.head_dim", "66"), "model.head_dim = 66: in bfloat16 on a GPU, a multiple of 8"),
        (("800m", "--train.device", "cpu"), 'train.device = "cpu": p828 plan is about GPUs'),
        (("800m", "--train.dtype", "float32"), 'train.dtype = "float32": p828 plan is about bfloat16'),
        (("800m", "--gpu-count", "2"), "unknown flag --gpu-count"),
        (("80m",), "no preset '80m'"),
        ((), "no configuration given. Usage: p828 plan CONFIG"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(list(arguments))


def test_the_rate_of_a_damaged_run_is_that_of_the_numbers_it_has(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"kind": "step", "step": 1, "mfu": 0.9}]  # before the last steps
    records += [{"kind": "step", "step": step, "mfu": 0.25} for step in range(2, 102)]
    odd = [{}, {"mfu": "NaN"}, {"mfu": "text"}, {"mfu": [0.1]}, {"mfu": None}, {"mfu": 1e300}, {"mfu": -1}, {"mfu": 0}]
    records += [{"kind": "step", "step": step, **values} for step, values in enumerate(odd, start=102)]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:50], "no record", *lines[50:]]) + "\n")
    assert _rate_of_run(tmp_path) == 0.25
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1}) + "\n")
    assert _rate_of_run(tmp_path) == 0.0
