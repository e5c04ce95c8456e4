"""Clients that go away, that are too many, slow or stuck, and a decoder that fails: others are answered meanwhile."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serving import HeldDecoder, Served, asking, connected, rest_of, serving, wait_until

from p828.inference.generate import TextStream
from p828.serve.http import body, connection, server
from p828.serve.scheduling import scheduler

ASKED = {"prompt": "the cat", "max_tokens": 50, "temperature": 0}
LONG = {"prompt": "q" * 1_000_000, "return_token_strs": True}  # of /tokenize, an answer of 7 MB
WAITING = 2


@pytest.fixture
def held(chat_run: Path) -> Iterator[Served]:
    """One request at a time, whose steps wait until they are allowed."""
    with serving(chat_run, decoder=HeldDecoder, max_running=1, max_waiting=WAITING) as found:
        yield found


def decoder_of(served: Served) -> HeldDecoder:
    assert isinstance(served.decoder, HeldDecoder)
    return served.decoder


def present(served: Served) -> int:
    return served.service.scheduler.num_running + served.service.scheduler.num_waiting


def aborted(served: Served) -> int:
    text = httpx.get(f"{served.url}/metrics").text
    name = 'vllm:request_success_total{finished_reason="abort",model_name="run"}'
    return int(float(next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name))))


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server would have printed."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")]


def parts_of(answer: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Status line, headers and body."""
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = dict(line.decode().split(": ", 1) for line in lines)
    return status, {name.lower(): value for name, value in headers.items()}, content


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_goes_leaves_its_slot(
    held: Served, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    running = asking(held, **ASKED, stream=stream)
    wait_until(lambda: held.service.scheduler.num_running == 1)
    waiting = asking(held, **ASKED, stream=stream, n=2)
    wait_until(lambda: present(held) == 3)
    waiting.close()
    wait_until(lambda: present(held) == 1)
    running.close()
    wait_until(lambda: aborted(held) == 3)
    decoder_of(held).free()
    assert httpx.post(f"{held.url}/v1/completions", json=ASKED).status_code == 200
    assert faults(caplog) == []


def test_a_stream_that_is_broken_off_leaves_its_slot(held: Served, caplog: pytest.LogCaptureFixture) -> None:
    decoder_of(held).allow(4)
    reading = asking(held, **ASKED, stream=True)
    content = b""
    while b"data:" not in content:
        content += reading.recv(1000)
    reading.close()
    wait_until(lambda: aborted(held) == 1)
    decoder_of(held).free()
    assert httpx.post(f"{held.url}/v1/completions", json=ASKED).status_code == 200
    assert faults(caplog) == []


def test_one_too_many_is_told_when_to_come_again(held: Served) -> None:
    accepted = [asking(held, **ASKED) for _ in range(1 + WAITING)]
    wait_until(lambda: present(held) == 1 + WAITING)
    refused = httpx.post(f"{held.url}/v1/completions", json={**ASKED, "stream": True})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    several = httpx.post(f"{held.url}/v1/completions", json={**ASKED, "n": 4})
    assert several.status_code == 400, "which would never fit"
    assert "at most 3 are accepted, which run or wait at a time" in several.json()["error"]["message"]
    decoder_of(held).free()
    for one in accepted:
        assert one.recv(1000).startswith(b"HTTP/1.1 200")
        one.close()


def test_all_answers_of_a_request_are_taken_or_none(held: Served) -> None:
    first = asking(held, **ASKED)
    wait_until(lambda: held.service.scheduler.num_running == 1)
    refused = httpx.post(f"{held.url}/v1/completions", json={**ASKED, "n": 3})
    assert refused.status_code == 429
    said = "0 requests wait already, and there is no room for 3 more; try again in 1 second"
    assert refused.json()["error"]["message"] == said
    assert present(held) == 1
    assert aborted(held) == 0
    first.close()


def test_where_connections_are_too_many_those_that_ask_nothing_are_cut(
    held: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 4)
    monkeypatch.setattr(connection, "SECONDS_TO_ASK", 600.0)
    first = asking(held, **ASKED)
    wait_until(lambda: held.service.scheduler.num_running == 1)
    answered = connected(held)
    answered.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    content = b""
    while not content.endswith(b'{"status":"ok"}'):
        content += answered.recv(1000)
    idle = [connected(held) for _ in range(8)]
    assert rest_of(answered) == b""
    assert [rest_of(one) for one in idle[:5]] == [b""] * 5
    assert httpx.get(f"{held.url}/health").status_code == 200
    decoder_of(held).free()
    assert first.recv(1000).startswith(b"HTTP/1.1 200")
    for one in [first, answered, *idle]:
        one.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(chat_run: Path, stream: bool) -> None:
    with serving(chat_run, decoder=HeldDecoder, max_running=1, max_seconds=0.3) as held:
        waited = httpx.post(f"{held.url}/v1/completions", json={**ASKED, "stream": stream}, timeout=60)
        assert waited.status_code == 504
        assert "longer than 0.3 seconds" in waited.json()["error"]["message"]


def test_what_ends_a_stream_is_its_last_event(chat_run: Path) -> None:
    with serving(chat_run, decoder=HeldDecoder, max_running=1) as held:
        decoder = decoder_of(held)
        decoder.allow(4)
        with httpx.stream("POST", f"{held.url}/v1/completions", json={**ASKED, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            assert "text" in next(line for line in lines if line)
            decoder.errors.append(MemoryError("no room for a step"))
            decoder.allow(1)
            *_, last = [line for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("decoder_failed", "server_error")
        assert "no room for a step" in error["message"]
        decoder.errors.append(MemoryError("no room for a step"))
        decoder.allow(1)
        whole = httpx.post(f"{held.url}/v1/completions", json=ASKED, timeout=60)
        assert whole.status_code == 500
        assert "no room for a step" in whole.json()["error"]["message"]
        decoder.free()
        assert httpx.post(f"{held.url}/v1/completions", json=ASKED).status_code == 200
        assert httpx.get(f"{held.url}/health").status_code == 200


def test_a_decoder_that_broke_is_told_by_health(chat_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(chat_run, decoder=HeldDecoder, max_running=1) as held:
        decoder_of(held).errors.append(ZeroDivisionError("of the kernel"))
        decoder_of(held).allow(1)
        assert httpx.post(f"{held.url}/v1/completions", json=ASKED, timeout=60).status_code == 500
        health = httpx.get(f"{held.url}/health")
        assert health.status_code == 503
        assert "of the kernel" in health.json()["error"]["message"]
        assert httpx.post(f"{held.url}/v1/completions", json=ASKED).status_code == 500
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_printed_and_the_slot_is_left(
    held: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def fail(self: TextStream, token: int) -> str:
        raise ZeroDivisionError("of the text")

    decoder_of(held).allow(2)
    with monkeypatch.context() as broken:
        broken.setattr(TextStream, "push", fail)
        answer = httpx.post(f"{held.url}/v1/completions", json={**ASKED, "stream": stream}, timeout=60)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server has a fault, which it has printed"
    wait_until(lambda: aborted(held) == 1)
    wait_until(lambda: "ZeroDivisionError: of the text" in caplog.text)  # without pytest it is printed
    decoder_of(held).free()
    assert httpx.post(f"{held.url}/v1/completions", json=ASKED).status_code == 200


def test_what_is_not_done_when_the_grace_is_over_is_told(held: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(scheduler, "STUCK_SECONDS", 0.1)
    accepted = [asking(held, **ASKED, stream=stream) for stream in (False, True)]
    wait_until(lambda: present(held) == 2)
    held.server.stop()
    for one in accepted:
        status, _, content = parts_of(rest_of(one))
        assert status == b"HTTP/1.1 503 Service Unavailable"
        assert json.loads(content)["error"]["message"] == "the server is shutting down"


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_does_not_read_is_cut_off_at_the_end(
    chat_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_stream: bool
) -> None:
    """An answer that is too long for the system's buffers, and a stream of many answers with their likeliest tokens.

    The buffers are small, so that no long answer has to be made: on a busy machine that took more than a minute.
    """
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(server, "CLOSING_SECONDS", 0.3)
    stream = {"prompt": "the cat", "n": 16, "max_tokens": 120, "logprobs": 20, "stream": True}
    whole = {"prompt": "q" * 150_000, "return_token_strs": True}
    path, fields = ("/v1/completions", stream) if is_stream else ("/tokenize", whole)
    with serving(chat_run, send_bytes=2**15) as own:
        stuck = asking(own, path, **fields)
        assert stuck.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: any(one.flow.write_paused for one in list(own.server.server_state.connections)))
        own.server.stop()
        answer = whole_after_a_while(own, stuck)
    assert b"[DONE]" not in answer
    assert faults(caplog) == []


def test_a_body_that_comes_too_slowly_is_not_waited_for(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "SECONDS", 0.2)
    slow = connected(served)
    slow.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
    status, headers, content = parts_of(rest_of(slow))
    assert status == b"HTTP/1.1 408 Request Timeout"
    assert headers["connection"] == "close"
    assert json.loads(content)["error"]["message"] == "the body took longer than 0.2 seconds"
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("sent, is_first", [(b"", True), (b"GET /hea", True), (b"GET /hea", False)])
def test_a_connection_that_never_asks_is_closed(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, sent: bytes, is_first: bool
) -> None:
    monkeypatch.setattr(connection, "SECONDS_TO_ASK", 0.2)
    silent = connected(served)
    if not is_first:
        silent.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        said = b""
        while b'{"status":"ok"}' not in said:
            said += silent.recv(1000)
    silent.sendall(sent)
    assert rest_of(silent) == b""
    assert http.get("/health").status_code == 200


def test_a_client_that_does_not_read_is_cut_off(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SECONDS_TO_READ", 0.2)
    stuck = asking(served, "/tokenize", **LONG)
    assert stuck.recv(100).startswith(b"HTTP/1.1 200")
    before = http.get("/health")
    assert before.status_code == 200
    answer = whole_after_a_while(served, stuck)
    assert 0 < len(answer) < 6_000_000


def test_a_client_that_reads_slowly_gets_all(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an answer that takes several times as long as a client may read nothing."""
    monkeypatch.setattr(connection, "SECONDS_TO_READ", 0.5)
    answer = b""
    with httpx.stream("POST", f"{served.url}/tokenize", json=LONG, timeout=60) as slow:
        for piece in slow.iter_raw(2**16):
            answer += piece
            time.sleep(0.02)
    assert json.loads(answer)["count"] == 1_000_000


def whole_after_a_while(served: Served, stuck: socket.socket) -> bytes:
    """What a client still gets that begins to read after the server has closed its side."""
    host, port = stuck.getsockname()
    wait_until(
        lambda: (
            not any(
                other.raddr and (other.raddr.ip, other.raddr.port) == (host, port) and other.status == "ESTABLISHED"
                for other in psutil.Process().net_connections()
            )
        )
    )
    return rest_of(stuck)


def test_a_client_that_closes_before_its_body_is_whole_harms_nobody(
    served: Served, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for sent in (
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
        b"PO",
    ):
        gone = connected(served)
        gone.sendall(sent)
        gone.close()
    assert http.get("/health").status_code == 200
    assert faults(caplog) == []
