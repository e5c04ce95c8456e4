from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants

from exported import save_model
from p828.cli.main import dispatch
from p828.errors import ConfigError, RunFailed
from p828.interchange.hub import check_push, push
from tiny import tiny_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process's client talks to, logged in."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HF_HUB_DISABLE_XET", True
        )  # the stand-in has the plain interface for large files
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "export"
    directory.mkdir()
    (directory / "README.md").write_text("---\nlibrary_name: transformers\n---\nA model.\n")
    (directory / "config.json").write_text("{}")
    (directory / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 1000)
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"\x00" * 77)
    (directory / "empty.txt").write_text("")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_byte_arrives_in_a_new_private_repository(hub: Hub, export: Path) -> None:
    check_push("somebody/tiny")
    assert push(export, "somebody/tiny") == f"{hub.address}/somebody/tiny"
    assert hub.repositories["somebody/tiny"]["visibility"] == "private"
    assert hub.files["somebody/tiny"] == contents(export)
    assert len(hub.store) == 2


def test_a_single_file_goes_to_the_account_that_is_logged_in(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" * 500)
    push(file, "tiny")
    assert hub.files["somebody/tiny"] == {"tiny.gguf": file.read_bytes()}


def test_a_second_push_replaces_the_weights_and_leaves_other_files(hub: Hub, export: Path) -> None:
    push(export, "somebody/tiny")
    hub.files["somebody/tiny"]["notes.md"] = b"mine"
    for path in export.glob("*.safetensors"):
        path.unlink()
    (export / "model.safetensors").write_bytes(b"new")
    push(export, "somebody/tiny")
    assert hub.files["somebody/tiny"] == {**contents(export), "notes.md": b"mine"}


@pytest.mark.parametrize(
    "part, statuses, words",
    [
        ("/repos/create", [401], "does not accept the token; run `hf auth login`"),
        ("/repos/create", [403], "may not write there: .*refused with 403"),
        ("/repos/create", [500], "refused with 500"),
        ("/commit/", [500], "refused with 500"),
        ("/commit/", [0], "disconnected|closed|reset"),
        ("/preupload/", [500] * 6, "refused with 500"),
        ("/store/", [0] * 12, "Error while uploading 'model-0000.*(disconnected|closed|reset)"),
    ],
    ids=str,
)
def test_a_failure_is_told_and_how_to_push_again(
    hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch, part: str, statuses: list[int], words: str
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    before = contents(export)
    hub.failures[part] = statuses
    with pytest.raises(RunFailed, match=rf"(?is)^--push somebody/tiny: .*({words})") as raised:
        push(export, "somebody/tiny")
    assert str(raised.value).endswith(
        f"\n{export} is complete; to push it again: hf upload somebody/tiny {export} --private"
    )
    assert str(raised.value).count("\n") == 1
    assert contents(export) == before
    assert not hub.files.get("somebody/tiny")


def test_attempts_that_fail_are_repeated(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.failures = {"/preupload/": [500, 503], "/store/": [0, 502]}
    push(export, "somebody/tiny")
    assert hub.files["somebody/tiny"] == contents(export)


def test_a_hub_that_is_not_there(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunFailed, match=r"the push failed: .*refused"):
        push(export, "somebody/tiny")


@pytest.mark.parametrize("name", ["a/b/c", "some body/tiny", "", "-tiny", "https://huggingface.co/somebody/tiny"])
def test_wrong_names_are_refused_before_anything_is_asked(hub: Hub, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--push '.*': .*[Rr]epo"):
        check_push(name)
    assert not hub.requests


def test_without_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ConfigError, match=r"^--push tiny: not logged in to the hub; run `hf auth login`, or set HF_TOKEN$"
    ):
        check_push("tiny")


def test_the_command_pushes_what_it_exports(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, directory = save_model(tmp_path / "run", tiny_model(attention_sinks=False)), tmp_path / "new/export"
    for name in ("a/b/c", ""):
        assert dispatch(["export", str(run), str(directory), "--push", name]) == 2
    assert not hub.requests
    assert not directory.parent.exists()
    hub.failures["/commit/"] = [500]
    assert dispatch(["export", str(run), str(directory), "--push", "somebody/tiny"]) == 1
    shown = capsys.readouterr()
    assert "exported as" in shown.out
    assert "pushed to" not in shown.out
    assert f"to push it again: hf upload somebody/tiny {directory} --private" in shown.err
    push(directory, "somebody/tiny")
    assert hub.files["somebody/tiny"] == contents(directory)
    assert dispatch(["export", str(run), str(tmp_path / "other"), "--push", "somebody/tiny"]) == 0
    assert f"pushed to      {hub.address}/somebody/tiny\n" in capsys.readouterr().out


def test_nothing_is_pushed_by_default(hub: Hub, tmp_path: Path) -> None:
    run = save_model(tmp_path / "run", tiny_model(attention_sinks=False))
    assert dispatch(["export", str(run), str(tmp_path / "export")]) == 0
    assert not hub.requests


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^--push tiny: HF_HUB_OFFLINE is set$"):
        check_push("tiny")
