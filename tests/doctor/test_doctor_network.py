"""Reachability, against a server of the test's own, which answers, refuses, fails or says nothing."""

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import constants

from p828.config import Config, TrackersConfig, load
from p828.doctor.network import check_network, problem_at
from p828.doctor.trackers import check_trackers
from p828.doctor.versions import _extras

released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/silent"):
            released.wait(30)
            return
        code = {"/error": 503, "/missing": 404}.get(self.path, 200)
        self.send_response(code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, format: str, *values: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def online(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return address


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nobody listens at."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setenv("WANDB_BASE_URL", address)


def with_trackers(**asked: Any) -> Config:
    return replace(load("quickstart"), trackers=TrackersConfig(**asked))


def with_wandb(mode: str) -> Config:
    config = load("quickstart")
    return replace(config, wandb=replace(config.wandb, mode=mode))


def test_what_answers_is_reached(address: str) -> None:
    assert problem_at(f"{address}/") == ""
    assert problem_at(f"{address}/missing") == ""


def test_a_servers_error_is_told(address: str) -> None:
    assert problem_at(f"{address}/error") == "answers with error 503"


def test_an_answer_that_does_not_come_is_not_waited_for(address: str) -> None:
    assert problem_at(f"{address}/silent", within=0.3) == "no answer within 0.3 seconds"


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nonsense", "http://[", "ftp://127.0.0.1/", ""])
def test_what_cannot_be_reached_is_a_line(address: str) -> None:
    problem = problem_at(address)
    assert problem.startswith("cannot be reached (")
    assert "\n" not in problem


def test_online_both_are_ok(online: str) -> None:
    hub, wandb = check_network(None)
    assert (hub.status, wandb.status) == ("ok", "ok")
    assert online in hub.text
    assert online in wandb.text


def test_wandb_without_a_key_is_a_failure_for_a_run_that_is_online(
    online: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_network(with_wandb("offline"))[1].status == "ok"
    found = check_network(with_wandb("online"))[1]
    assert found.status == "failure"
    assert "wandb login" in found.remedy
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert check_network(with_wandb("online"))[1].status == "ok"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "config, words",
    [(None, "local files"), (load("quickstart"), "needs nothing from it"), (load("60m"), "local files")],
    ids=["machine", "quickstart", "60m"],
)
def test_offline_is_a_warning_with_what_still_works(config: Config | None, words: str) -> None:
    hub, wandb = check_network(config)
    assert (hub.status, wandb.status) == ("warning", "warning")
    assert words in hub.text
    assert "HF_HUB_OFFLINE" in hub.remedy
    assert "its own records" in wandb.text
    assert check_network(with_wandb("online"))[1].text.endswith("the run would be recorded offline")


def test_offline_on_purpose_the_hub_is_not_asked_and_wandb_is(online: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    hub, wandb = check_network(None)
    assert (hub.status, wandb.status) == ("ok", "ok")
    assert wandb.text == f"{online} answers"


def test_a_setting_that_wandb_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "no address")
    assert check_network(None)[1].status == "warning"
    found = check_network(with_wandb("online"))[1]
    assert "WANDB_" in found.text


def test_trackers_that_are_asked_for_and_not_there_fail_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_trackers(None) == check_trackers(with_trackers()) == []
    for name in ("tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    config = with_trackers(tensorboard=True, trackio=True)
    assert _extras(config) == ["tensorboard", "trackio"], "whose versions are looked at"
    checks = check_trackers(config)
    assert [(check.name, check.status, check.remedy) for check in checks] == [
        ("tensorboard", "failure", "pip install 'p828[tensorboard]'"),
        ("trackio", "failure", "pip install 'p828[trackio]'"),
    ]
    assert all("cannot be imported" in check.text for check in checks)


def test_a_trackio_server_that_does_not_answer_is_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trackio", "trackio.run"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    config = with_trackers(trackio=True)
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    monkeypatch.delenv("TRACKIO_SERVER_URL", raising=False)
    assert check_trackers(config)[0].text == "can be imported"
    monkeypatch.setenv("TRACKIO_SERVER_URL", f"{address}/?write_token=secret")
    assert check_trackers(config)[0].text == f"can be imported; {address}/ answers"
    monkeypatch.setenv("TRACKIO_SERVER_URL", f"{address}/error?write_token=secret")
    (check,) = check_trackers(config)
    assert (check.status, "secret" in check.text) == ("warning", False)
    assert "answers with error 503; rows are kept here" in check.text
