"""`p828 serve` as a user starts and ends it."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import NAME, tokenizer_of

from exported import save_model
from p828.cli.main import dispatch
from p828.cli.serve import Arguments, api_key
from p828.inference.generate import generate
from p828.inference.load import load_model
from p828.inference.sampling_config import SamplingConfig
from p828.serve.http.server import listen
from runs import start
from tiny import tiny_model

CONTEXT = 2048


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose answers take a second."""
    model = tiny_model(vocab_size=290, max_position_embeddings=CONTEXT)
    return save_model(tmp_path_factory.mktemp("served") / "run", model, tokenizer_of(chat=False))


@contextmanager
def started(run: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], list[str], str]]:
    """The process, what it said at the start, and its address."""
    with start("serve", str(run), "--port", "0", "--device", "cpu", *flags, cwd=run) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        try:
            yield process, lines, lines[3].split()[-1].rstrip("/")
        finally:
            process.kill()


def test_it_says_where_it_is_and_finishes_what_runs(run: Path) -> None:
    with started(run, "--slots", "2", "--context", "1000") as (process, lines, address):
        text = "".join(lines)
        assert f"{NAME}, {run}/checkpoints/step_00000010 (step 10)" in text
        assert "cpu in float32" in text
        assert "2 of 1,000 tokens" in text
        assert re.search(r"/v1 as base URL of OpenAI's API, without chat", text)
        assert httpx.get(f"{address}/health", headers={"Host": "elsewhere.com"}).status_code == 403
        asked = {"prompt": "the cat", "max_tokens": 200, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=60) as answer:
            events = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            begin = next(events)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert any("SIGTERM: answering what was accepted, for 25 seconds" in line for line in process.stderr)
            *rest, last = events
        assert last == "[DONE]"
        found = "".join(json.loads(event)["choices"][0]["text"] for event in [begin, *rest])
        assert process.wait(60) == 0
    loaded = load_model(run, "cpu")
    sampling = SamplingConfig(temperature=0, max_new_tokens=200)
    (expected,) = generate(loaded.model, loaded.tokenizer, ["the cat"], sampling)
    assert found == expected.text


def test_a_second_signal_ends_it_at_once(run: Path) -> None:
    with started(run, "--host", "0.0.0.0") as (process, _, address):
        assert process.stderr is not None
        assert any("0.0.0.0 is reached from other machines" in line for line in process.stderr)
        assert httpx.get(f"{address}/health", headers={"Host": "elsewhere.com"}).status_code == 200
        asked = {"prompt": "the cat", "max_tokens": 2000, "ignore_eos": False, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert any("SIGINT" in line for line in process.stderr)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130


def test_with_a_key_it_is_reached_by_any_name(run: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-key")
    with started(run, "--api-key-file", str(tmp_path / "key")) as (_, _, address):
        assert httpx.get(f"{address}/health", headers={"Host": "elsewhere.com"}).status_code == 200


def test_a_port_that_is_taken_is_told_in_a_line(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert dispatch(["serve", str(run), "--port", str(port)]) == 2
    assert capfd.readouterr().err == (
        f"p828: --host 127.0.0.1 --port {port}: cannot listen there: Address already in use\n"
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "no CHECKPOINT given"),
        (["nowhere"], "nowhere"),
        (["RUN", "--port", "65536"], "--port 65536: 0 to 65535 is accepted"),
        (["RUN", "--host", "no host"], "--host no host --port 8000: cannot listen there"),
        (["RUN", "--host", "a" * 64 + ".b"], "not the name of a host"),
        (["RUN", "--slots", "0"], "--slots 0: a whole number of at least 1"),
        (["RUN", "--slots", "100000000"], "fewer --slots or a shorter --context is accepted"),
        (["RUN", "--context", "1"], "--context 1: a whole number of at least 2"),
        (["RUN", "--context", str(CONTEXT + 1)], f"at most {CONTEXT} is accepted"),
        (["RUN", "--max-waiting", "-1"], "--max-waiting -1: a whole number of at least 0"),
        (["RUN", "--timeout", "0"], "--timeout 0: a number of seconds above 0"),
        (["RUN", "--timeout", "nan"], "--timeout nan: a number of seconds above 0"),
        (["RUN", "--api-key-file", "nowhere"], "--api-key-file nowhere: cannot be read as a key: No such file"),
        (["RUN", "--api-key", "secret"], "did you mean --api-key-file?"),
        (["RUN", "--slot", "1"], "did you mean --slots?"),
    ],
)
def test_wrong_flags_are_told_in_a_line(
    run: Path, capfd: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    given = [str(run) if flag == "RUN" else flag for flag in flags]
    port = [] if "--port" in flags or "--host" in flags else ["--port", "0"]
    assert dispatch(["serve", *given, *port]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content", ["", " \n", "two words", "ä", "k" * 5000])
def test_what_is_no_key_is_refused(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "key").write_text(content)
    assert dispatch(["serve", str(run), "--port", "0", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "key" in capfd.readouterr().err
    if len(content) < 5000:
        monkeypatch.setenv("P828_API_KEY", content)
        assert dispatch(["serve", str(run), "--port", "0"]) == 2
        assert "P828_API_KEY: a key of printable ASCII characters" in capfd.readouterr().err


def test_a_key_is_read_from_the_file_or_else_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("of-the-file\n")
    assert api_key(Arguments("run")) == ""
    monkeypatch.setenv("P828_API_KEY", "of-the-environment")
    assert api_key(Arguments("run")) == "of-the-environment"
    assert api_key(Arguments("run", api_key_file=str(tmp_path / "key"))) == "of-the-file"


def test_the_address_takes_small_pieces_at_once() -> None:
    """asyncio leaves it to the system otherwise, where every second piece of an answer waits 40 ms."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()[:2]):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    if os.path.exists("/proc/net/if_inet6") and "lo" in Path("/proc/net/if_inet6").read_text():
        with listen("::1", 0) as listening:
            assert listening.family == socket.AF_INET6
