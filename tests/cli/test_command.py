"""The command itself: its version and help, outputs that lack letters, and environments that are no launcher's."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from p828 import config
from p828.cli.main import dispatch
from p828.cli.train import _let_threads_sleep
from p828.distributed.launcher import Process, launched
from runs import write_toml

RUNS_OF_OLD_VERSIONS = Path(__file__).parent.parent / "data_of_old_versions" / "runs"
QUICK = ("--train.steps", "2", "--evaluation.every", "0")


def run(*arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "p828", *arguments], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["--version"]) == 0
    assert capsys.readouterr().out == f"p828 {version('p828')}\n"


@pytest.mark.parametrize(
    "outputs, code, says",
    [
        ("> /dev/full", 1, "p828: the output cannot be written: No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_is_full_or_closed(tmp_path: Path, outputs: str, code: int, says: str) -> None:
    command = ["bash", "-c", f'"$0" -m p828 runs "$1" {outputs}', sys.executable, str(RUNS_OF_OLD_VERSIONS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, says)


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    code = "import os; from p828.cli.output import open_closed_streams as f; f(); os._exit(os.open(os.devnull, 0))"
    command = ["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, check=False).returncode > 2


def test_help_of_train_needs_no_torch() -> None:
    code = """
import sys
from p828.cli.main import dispatch
dispatch(["--help"])
try:
    dispatch(["train", "quickstart", "--help"])
except SystemExit as stop:
    print("EXIT", stop.code, {"torch", "numpy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("EXIT 0 set()\n")


def test_the_sizes_in_the_help_are_of_the_configuration_given(capsys: pytest.CaptureFixture[str]) -> None:
    for named, shown in ((["quickstart"], True), ([], False)):
        with pytest.raises(SystemExit):
            dispatch(["train", *named, "--help"])
        assert ("MFLOPs" in capsys.readouterr().out) == shown


@pytest.mark.parametrize(
    "command, parts",
    [
        ("train", ["CONFIG", "--dry-run", "--presets", "--model.hidden-size", "--data.files"]),
        ("prepare", ["CONFIG", "--data.prepared"]),
        ("prove-resume", ["CONFIG", "--kills", "--ranks", "--resume-ranks"]),
        ("generate", ["CHECKPOINT", "--prompt", "--interactive", "--stop", "--seed"]),
        ("doctor", ["CONFIG|RUN", "--json", "--model.hidden-size"]),
        ("evaluate", ["CHECKPOINT", "--rows", "--data.files"]),
        ("export", ["CHECKPOINT", "DIR", "--dtype", "--native-only"]),
        ("bench train", ["--shape", "--peers", "--breakdown", "--json"]),
        ("bench generate", ["--shape", "--batch", "--prompt-length", "--json"]),
    ],
)
def test_help_lists_what_a_command_takes(command: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        dispatch([*command.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    described = said[said.index("show this help") :]  # behind the usage
    for part in parts:
        assert part in (described if part.startswith("--") else said[said.index("positional arguments") :])


def test_presets_are_a_table_for_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", "--presets"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 60
    for part in ("quickstart", "0.9 M", "fine-grained", "1,057.6 M", "264.9 M", "4,096", "codeparrot-clean", "stdlib"):
        assert part in said
    assert dispatch(["train", "--presets", "quickstart"]) == 2


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--lr", "--optimizer.learning-rate"),
        ("--learning-rate", "--optimizer.learning-rate"),
        ("--learning_rate=3", "--optimizer.learning-rate"),
        ("--optimizer.lr", "--optimizer.learning-rate"),
        ("--train.batch-size", "--train.micro-batch-size"),
        ("--batch-size", "--train.micro-batch-size"),
        ("--epochs", "--train.steps"),
        ("--seed", "--train.seed"),
        ("--steps", "--train.steps"),
        ("--max-steps", "--train.steps"),
        ("--context", "--data.sequence-length"),
        ("--warmup", "--schedule.warmup-steps"),
        ("--warmup-steps", "--schedule.warmup-steps"),
        ("--layers", "--model.num-hidden-layers"),
        ("--hidden-size", "--model.hidden-size"),
        ("--files", "--data.files"),
        ("--dropout", "--model.dropout"),
        ("--device", "--train.device"),
        ("--dry-rnu", "--dry-run"),
    ],
)
def test_the_names_that_others_use_suggest_the_flag(flag: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", "quickstart", flag, "3"]) == 2
    said = capsys.readouterr().err
    assert f"did you mean {meant}" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        *(pytest.param({**more, "LC_ALL": "C"}, marks=pytest.mark.long) for more in ({}, {"LANG": "C"})),
    ],
)
def test_an_output_without_accents(tmp_path: Path, environment: dict[str, str]) -> None:
    """Every command says what it has to say, escaped where need be."""
    place = tmp_path / "é🙂"
    place.mkdir()
    write_toml(place)
    toml, flags = f"{place}/tiny.toml", (*QUICK, "--name", "né")

    def works(*arguments: str) -> str:
        done = run(*arguments, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "n" in works("train", toml, *flags, "--dry-run")
    works("prepare", toml, "--data.prepared", "tokené")
    works("train", toml, *flags)
    works("evaluate", "runs/né", "--data.files", f"{place}/text/*.txt")
    works("generate", "runs/né", "--prompt", "é", "--prompt", "ü", "--max-new-tokens", "2")
    wrong = run("generate", "runs/né", "--prompt", "é" * 200, cwd=tmp_path, **environment)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_threads_that_wait_leave_the_processors_to_others(tmp_path: Path) -> None:
    done = run("train", "quickstart", "--data.files", "gone.txt", cwd=tmp_path, OMP_DISPLAY_ENV="verbose")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr  # libgomp says what it has read


@pytest.mark.parametrize("name, value", [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_how_threads_wait_may_be_set(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    _let_threads_sleep()
    assert dict(os.environ) == before


def test_a_dry_run_says_what_is_hardly_meant(tmp_path: Path) -> None:
    path = str(write_toml(tmp_path))
    done = run("train", path, "--dry-run", "--model.num-experts-per-tok", "1", cwd=tmp_path)
    assert "# model.num_experts_per_tok = 1 with model.norm_topk_prob = true: " in done.stdout
    (tmp_path / "again.toml").write_text(done.stdout)
    assert config.load(str(tmp_path / "again.toml")).model.num_experts_per_tok == 1
    assert "norm_topk_prob = true:" not in run("train", path, "--dry-run", cwd=tmp_path).stdout


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LEFT_BEHIND = ({"RANK": "1"}, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "x"})


@pytest.mark.parametrize("environment", LEFT_BEHIND)
def test_a_lone_process_speaks(tmp_path: Path, environment: dict[str, str]) -> None:
    path = str(write_toml(tmp_path))
    done = run("train", path, *QUICK, "--dry-run", cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "steps = 2" in done.stdout
    wrong = run("train", path, "--lr", "3", cwd=tmp_path, **environment)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("p828: unknown flag --lr")


@pytest.mark.parametrize("command", ["prepare", "generate", "evaluate", "prove-resume", "bench"])
def test_only_training_heeds_a_launcher(tmp_path: Path, command: str) -> None:
    second = {**ADDRESS, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    asked = run(command, "--help", cwd=tmp_path, **second)
    assert command in asked.stdout
    wrong = run(command, "--nonsense", cwd=tmp_path, **second)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("p828: ")


def test_a_lone_process_trains_whatever_rank_was_left_behind(tmp_path: Path) -> None:
    path = str(write_toml(tmp_path))
    done = run("train", path, *QUICK, cwd=tmp_path, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", SLURM_PROCID="1")
    assert done.returncode == 0, done.stderr
    assert "is complete at step 2" in done.stdout


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Process()),
        *((left, Process()) for left in LEFT_BEHIND),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "1"}, Process()),
        (ADDRESS, Process()),
        ({**ADDRESS, "RANK": "3", "WORLD_SIZE": "x"}, Process()),
        ({**ADDRESS, "RANK": "1", "WORLD_SIZE": "1"}, Process()),
        ({**ADDRESS, "RANK": "5", "WORLD_SIZE": "2"}, Process()),
        ({**ADDRESS, "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Process(3, 8, 1, True, 0)),
        ({**ADDRESS, "RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Process(2, 8, 0, True, 4)),
        ({**ADDRESS, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}, Process(0, 1, 0, True, 1)),
    ],
)
def test_a_launcher_sets_all(environment: dict[str, str], expected: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", *ADDRESS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


def test_a_model_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    huge = ("--model.vocab-size", "2000000000", "--model.hidden-size", "65536")
    done = run("train", str(write_toml(tmp_path)), *QUICK, *huge, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert re.search(r"parameters takes more than [\d,]+ GB to train", done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()


def test_torchruns_second_process_is_the_second(tmp_path: Path) -> None:
    """What the rule takes for a launcher is one."""
    script = tmp_path / "say.py"
    script.write_text("from p828.distributed.launcher import launched\nprint(tuple(launched()), flush=True)\n")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert sorted(re.findall(r"\(.*?\)", done.stdout)) == ["(0, 2, 0, True, 2)", "(1, 2, 1, True, 2)"]


NUL, LONG = "a\0b", "x" * 5000


@pytest.mark.parametrize("value", [NUL, LONG, "y" * 300 + "/z"], ids=["nul", "long", "long part"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "quickstart", "--runs-dir"),
        ("train", "quickstart", "--name"),
        ("train", "quickstart", "--data.prepared"),
        ("train", "quickstart", "--data.files"),
        ("train", "quickstart", "--data.validation.files"),
        ("train", "quickstart", "--tokenizer.name"),
        ("train", "quickstart", "--data.hub-name"),
        ("train", "quickstart", "--engine", "deepspeed", "--deepspeed.config"),
        ("train",),
        ("prepare", "quickstart", "--data.prepared"),
        ("generate", "--prompt", "a"),
        ("evaluate",),
        ("evaluate", "none", "--data.files"),
        ("bench", "train", "--shape"),
        ("bench", "train", "--shape", "quickstart", "--json"),
        ("prove-resume", "quickstart", "--runs-dir"),
        ("",),
    ],
    ids=" ".join,
)
def test_names_that_no_file_can_have(
    arguments: tuple[str, ...], value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert dispatch([*filter(None, arguments), value]) == 2
    said = capsys.readouterr().err
    assert said.startswith("p828: ")
    assert 1 <= len(said.splitlines()) <= 2
    assert max(map(len, said.splitlines())) < 500
    assert not list(tmp_path.iterdir())


def test_the_launcher_finds_the_checkouts_own_environment_and_leaves_the_engine_to_p828(tmp_path: Path) -> None:
    """A stand-in for each interpreter says which one was called."""
    checkout, path = tmp_path / "checkout", tmp_path / "path"
    script = Path(__file__).parents[2] / "launch_distributed.sh"
    for place, name in ((checkout / ".venv" / "bin", "python"), (path, "python3"), (path, "other")):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"#!/bin/sh\necho {name} $@\n")
        (place / name).chmod(0o755)
    (checkout / script.name).write_text(script.read_text())

    def called(*flags: str, **environment: str) -> str:
        environment = {"PATH": f"{path}:{os.environ['PATH']}", "GPUS": "1", **environment}
        command = ["bash", str(checkout / script.name), "60m", *flags]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    expected = "-m p828.distributed.torchrun --standalone --nproc-per-node 1 -m p828 train 60m\n"
    assert called() == f"python {expected}"
    assert called("--deepspeed_config", "zero2").endswith("60m --deepspeed_config zero2\n")
    assert called("--engine", "sharded").endswith("60m --engine sharded\n")
    assert called(PYTHON="other") == f"other {expected}"
    (checkout / ".venv" / "bin" / "python").unlink()
    assert called() == f"python3 {expected}"
