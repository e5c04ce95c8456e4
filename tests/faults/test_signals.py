"""Runs that are asked to end."""

import os
import pty
import re
import signal
import string
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from p828.runs import checkpoint, file_names, records
from runs import in_process, p828, start, wait_for_step, write_text, write_toml
from same_run import assert_same_run
from shim import Shim


def test_a_launchers_sigterm_after_the_terminals_sigint_is_no_second_wish(tmp_path: Path) -> None:
    process = start("train", str(write_toml(tmp_path, train={"steps": 5_000})), cwd=tmp_path)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "which is saved" in said


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.long) for other in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_run_that_is_asked_to_end_is_saved_and_goes_on_exactly(tmp_path: Path, number: signal.Signals) -> None:
    path = str(write_toml(tmp_path, model={"dropout": 0.1}, train={"steps": 60}, checkpoint={"every": 1000}))
    assert in_process("train", path, "--name", "whole", cwd=tmp_path)[0] == 0
    process = start("train", path, "--name", "asked", cwd=tmp_path)
    wait_for_step(process, 9)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert f"{number.name}: saving after this step" in out
    found = re.fullmatch(
        rf"p828: stopped by {number.name} after step (\d+), which is saved; the same command goes on from there\n", said
    )
    assert found, said
    newest = checkpoint.resolve(tmp_path / "runs" / "asked")
    assert file_names.step_of(newest) == int(found[1]) >= 9
    code, out, said = in_process("train", path, "--name", "asked", cwd=tmp_path)
    assert code == 0, said
    assert f"resumed from step {found[1]}" in out
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "asked", step=60)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Between the two a step cannot end: it takes seconds."""
    slow = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    train = {"micro_batch_size": 32, "gradient_accumulation": 2}
    path = str(write_toml(tmp_path, model=slow, train=train, evaluation={"every": 0}))
    process = start("train", path, cwd=tmp_path)
    wait_for_step(process, 1)
    for _ in range(20):  # of signals that come before the first is handled, the system keeps one
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert said == ""
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step_*"))


def test_ctrl_c_in_the_training_of_a_tokenizer_ends_the_run_at_once(tmp_path: Path) -> None:
    """The library's thread comes back for more text, and would crash an interpreter that takes its time to end."""
    process = start("train", "quickstart", "--train.device", "cpu", cwd=tmp_path)
    assert process.stdout is not None
    assert any("training a tokenizer" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "p828: interrupted\n")


AT_ITS_IMPORT = """
import os, signal, sys

def interrupt(event, arguments):
    if event == "import" and arguments[0] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
from p828.__main__ import main
del sys.argv[2:]
main()
"""


@pytest.mark.parametrize("module", ["p828.cli.main", "p828.config.schema", "tyro", "p828.cli.output"])
def test_ctrl_c_while_the_command_is_imported_is_a_line(tmp_path: Path, module: str) -> None:
    assert p828(module, cwd=tmp_path, launcher=("-c", AT_ITS_IMPORT)) == (130, "", "p828: interrupted\n")


IN_AN_OPERATION = """
import signal, sys, threading
from p828.train.signals import graceful_shutdown
with graceful_shutdown(lambda: None, lambda text: print(text, flush=True)):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # no call of this thread is interrupted
    print("ready", flush=True)
    sys.stdin.buffer.read()
"""


def test_the_first_signal_is_answered_and_the_second_obeyed_within_an_operation() -> None:
    """Python's handlers run between two operations of the main thread, and a step's may take minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", IN_AN_OPERATION], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT: saving after this step; again to stop now\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    process.communicate()


AFTER_IT_IS_SAVED = """
import os, signal, sys
from p828.train.signals import graceful_shutdown
with graceful_shutdown(lambda: None) as shutdown:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    while not shutdown.reason:
        pass
os.kill(os.getpid(), signal.SIGHUP)
"""


@pytest.mark.parametrize("first", ["SIGHUP", "SIGTERM"])
def test_a_hangup_once_all_is_saved_changes_nothing(first: str) -> None:
    assert subprocess.run([sys.executable, "-c", AFTER_IT_IS_SAVED, first], check=False).returncode == 0


def test_under_nohup_a_hangup_changes_nothing(tmp_path: Path) -> None:
    path = str(write_toml(tmp_path, train={"steps": 60}))
    launcher = ("-c", "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
                "os.execv(sys.executable, [sys.executable, '-m', 'p828', *sys.argv[1:]])")  # fmt: skip
    process = start("train", path, cwd=tmp_path, launcher=launcher)
    wait_for_step(process, 9)
    process.send_signal(signal.SIGHUP)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "is complete at step 60" in out


def test_a_run_whose_terminal_goes_is_saved(tmp_path: Path) -> None:
    path = str(write_toml(tmp_path, train={"steps": 100_000}))
    main, terminal = pty.openpty()
    name = os.ttyname(terminal)
    # the leader of a session takes the first terminal that it opens for its own
    command = f"exec {sys.executable} -m p828 train {path} < {name} > {name} 2>&1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(["sh", "-c", command], cwd=tmp_path, env=environment, start_new_session=True)
    drawn = b""
    while b"step 5: validation" not in drawn:
        drawn += os.read(main, 65536)
    os.close(terminal)
    os.close(main)
    process.wait(timeout=60)
    newest = file_names.step_of(checkpoint.resolve(tmp_path / "runs" / "tiny"))
    steps = [line["step"] for line in records.read(tmp_path / "runs" / "tiny" / "metrics.jsonl") if "loss" in line]
    assert newest == max(steps) >= 5


def test_a_hung_read_is_left_behind(tmp_path: Path, shim: Shim) -> None:
    write_text(tmp_path / "more", documents=1500, seed=1)
    data = {"files": [str(tmp_path / "more" / "*.txt")], "sequence_length": 512, "block_documents": 4}
    path = write_toml(
        tmp_path,
        model={"max_position_embeddings": 512},
        data={**data, "shuffle_rows": 4},
        train={"steps": 40, "micro_batch_size": 8, "gradient_accumulation": 1},
        evaluation={"every": 0},
        checkpoint={"every": 900},
    )
    shim(file="/hung/", delay=2 * 10**9)
    process = start("train", str(path), cwd=tmp_path)
    wait_for_step(process, 3)
    (tmp_path / "more").rename(tmp_path / "hung")
    (tmp_path / "more").symlink_to(tmp_path / "hung")
    assert any("waiting for data" in line for line in process.stdout or ())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = re.search(r"stopped by SIGTERM after step (\d+), which is saved", said)
    assert found
    assert file_names.step_of(checkpoint.resolve(tmp_path / "runs" / "tiny")) == int(found[1])


def slow_tokenizer(path: Path) -> None:
    """A word-piece vocabulary of letters alone: for a word of n letters the library compares some n^3 / 6 bytes."""
    letters = string.ascii_lowercase
    tokens = ["<unk>", "</s>", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=10**9))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    inner.save(str(path))


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_ctrl_c_within_one_call_of_the_tokenizers_library_is_answered_at_once(tmp_path: Path, command: str) -> None:
    """One word of a hundred thousand letters, which the call would take days for."""
    slow_tokenizer(tmp_path / "slow.json")
    (tmp_path / "long.txt").write_text("a" * 100_000)
    tokenizer = {"name": str(tmp_path / "slow.json"), "eos_token": "</s>"}
    path = str(write_toml(tmp_path, tokenizer=tokenizer, train={"steps": 2}, evaluation={"every": 0, "prompts": []}))
    arguments = ["evaluate", "runs/tiny", "--data.files", str(tmp_path / "long.txt")]
    if command == "evaluate":
        assert in_process("train", path, cwd=tmp_path)[0] == 0
    else:
        files = ["--data.validation.kind", "files", "--data.validation.files", str(tmp_path / "long.txt")]
        arguments = ["train", path, *files]
    process = start(*arguments, cwd=tmp_path)
    output, says = (process.stderr, "measuring") if command == "evaluate" else (process.stdout, "validation rows")
    assert output is not None
    assert any(says in line for line in output)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "p828: interrupted\n")
