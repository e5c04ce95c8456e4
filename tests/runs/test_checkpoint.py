import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from p828.errors import ConfigError, DataError, RunFailed
from p828.runs import checkpoint, file_names
from p828.runs.checkpoint import DamagedCheckpoint
from p828.runs.manifest import FORMAT_VERSION, describe, manifest_bytes
from p828.train import checkpoint_writer


def parts(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"a": torch.full((3, 5), value), "b": torch.arange(7)},
        "optimizer": {"a": torch.full((2,), value)},
    }


def save(directory: Path, step: int, value: float = 1.0) -> Path:
    return checkpoint_writer.save(directory, step, parts(value), {"step": step})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=generator)  # as floats: NaNs and subnormals too
    shared = torch.randn(4, 6, generator=generator)
    tensors = {
        "model": {
            "float32": noise.view(torch.float32),
            "bfloat16": noise.view(torch.bfloat16).reshape(4, 8),
            "int64": noise.view(torch.int64),
            "uint8": noise.clone(),
            "bool": noise.clone() > 128,
            "scalar": torch.tensor(-0.0),
            "no_rows": torch.zeros(0, 3),
            "transposed": shared.T,
            "every_other": shared[:, ::2],
            "expanded": torch.tensor([1.5]).expand(3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        "tied": {"whole": shared, "again": shared, "view": shared[1:3]},
        "empty": {},
    }
    loaded = checkpoint.load(checkpoint_writer.save(tmp_path, 7, tensors, {})).tensors
    assert loaded.keys() == tensors.keys()
    for part in tensors:
        assert loaded[part].keys() == tensors[part].keys()
        for name, tensor in tensors[part].items():
            back = loaded[part][name]
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), name
            assert bits(back) == bits(tensor.detach()), name


def test_state_comes_back_as_strict_json(tmp_path: Path) -> None:
    state = {"best": math.inf, "worst": [-math.inf, math.nan], "pi": math.pi, "big": 2**70, "text": "NaN ü", "no": None}
    path = checkpoint_writer.save(tmp_path, 1, {}, state)
    back = checkpoint.load(path).state
    assert math.isnan(back["worst"].pop())
    assert back == {**state, "worst": [-math.inf]}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((path / "state.json").read_text(), parse_constant=refuse)


def test_state_with_a_key_that_json_would_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="key 3"):
        checkpoint_writer.save(tmp_path, 1, {}, {"moments": {3: 1.0}})
    assert names(tmp_path) == []


def test_only_the_named_parts_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "optimizer.safetensors").unlink()
    loaded = checkpoint.load(path, ["model"])
    assert loaded.tensors.keys() == {"model"}
    assert (loaded.step, loaded.state, loaded.path) == (5, {"step": 5}, path)
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors is missing"):
        checkpoint.load(path)
    with pytest.raises(DataError, match=r"no ema\.safetensors; its parts are model, optimizer"):
        checkpoint.load(path, ["ema"])


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    checkpoint.verify(path)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            with pytest.raises(DamagedCheckpoint) as caught:
                checkpoint.verify(path)
            assert str(path) in str(caught.value)
            assert file.name in str(caught.value)
        file.write_bytes(content)
    checkpoint.verify(path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_cut_grown_and_missing_files_are_found(tmp_path: Path, file: str) -> None:
    path = save(tmp_path, 1)
    content = (path / file).read_bytes()
    for damaged in (b"", content[:1], content[: len(content) // 2], content[:-1], content + b"\0", content + b"\n"):
        (path / file).write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint, match=file) as caught:
            checkpoint.load(path)
        if file != "manifest.json":
            assert f"{file} has {len(damaged)} bytes, {len(content)} were written" in str(caught.value)
    (path / file).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{file} is missing"):
        checkpoint.load(path)


def test_an_unlisted_file_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "notes.txt").write_text("the good one")
    checkpoint.verify(path)


def test_a_pickle_in_the_place_of_tensors_is_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.save({"a": torch.ones(1)}, path / "model.safetensors")
    files = {file.name: describe(file) for file in path.iterdir() if file.name != "manifest.json"}
    (path / "manifest.json").write_bytes(manifest_bytes({"format_version": FORMAT_VERSION, "step": 1, "files": files}))
    checkpoint.verify(path)
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        checkpoint.load(path)


@pytest.mark.parametrize("difference", [-1, 1])
def test_another_format_is_named_and_left_in_place(tmp_path: Path, difference: int) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    ours, other = FORMAT_VERSION, FORMAT_VERSION + difference
    (path / "manifest.json").write_bytes(manifest_bytes({**manifest, "format_version": other}))
    for read in (lambda: checkpoint.load(path), lambda: checkpoint.find_newest(tmp_path)):
        with pytest.raises(DataError, match=f"format is {other}; this version of p828 reads format {ours}") as caught:
            read()
        assert not isinstance(caught.value, DamagedCheckpoint)
    assert names(tmp_path) == ["step_00000001"]


def test_damaged_checkpoints_are_quarantined_and_the_one_before_is_used(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (1, 2, 10):
            save(tmp_path, step)
        (tmp_path / "step_00000010" / "state.json").write_text("{}")
        shutil.rmtree(tmp_path / "step_00000002")
        (tmp_path / "step_00000002").mkdir()
        newest, notes = checkpoint.find_newest(tmp_path)
        assert newest == tmp_path / "step_00000001"
        assert [note.splitlines() for note in notes] == [[note] for note in notes]
        assert ["state.json" in notes[0], "manifest.json is missing" in notes[1]] == [True, True]
    aside = ["damaged_step_00000002", "damaged_step_00000002_2", "damaged_step_00000010", "damaged_step_00000010_2"]
    assert names(tmp_path) == [*aside, "step_00000001"]
    assert aside[3] in notes[0]
    assert checkpoint.find_newest(tmp_path) == (newest, [])


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoint.find_newest(tmp_path) == (None, [])
    assert checkpoint.find_newest(tmp_path / "absent") == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 20):
        save(tmp_path, step)
    assert checkpoint.find_newest(tmp_path)[0] == tmp_path / "step_100000000"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, value=1.0)
    path = save(tmp_path, 3, value=2.0)
    assert checkpoint.load(path).tensors["model"]["a"].unique().tolist() == [2.0]
    assert names(tmp_path) == ["step_00000003"]


@pytest.mark.parametrize("best, kept", [(None, [4, 5]), (2, [2, 4, 5]), (5, [4, 5]), (99, [4, 5])])
def test_prune_keeps_the_last_and_the_best(tmp_path: Path, best: int | None, kept: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "damaged_step_00000009").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, best_step=best)
    assert names(tmp_path) == ["damaged_step_00000009", *(f"step_{step:08d}" for step in kept)]
    checkpoint.prune(tmp_path, keep_last=9, best_step=best)
    assert len(names(tmp_path)) == len(kept) + 1


def test_resolve_takes_a_run_its_checkpoints_or_one_of_them_and_changes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    older, newer = save(directory, 1), save(directory, 2)
    (directory / ".step_00000003.tmp").mkdir()  # a training is writing beside
    for named in (tmp_path, directory, newer):
        assert checkpoint.resolve(named) == newer
    assert checkpoint.resolve(older) == older
    (newer / "model.safetensors").write_bytes(b"")
    before = names(directory)
    assert checkpoint.resolve(tmp_path) == older
    assert names(directory) == before
    moved = newer.rename(tmp_path / "my_best")
    assert checkpoint.resolve(moved) == moved


def test_resolve_says_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    (tmp_path / "run2" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run3" / "checkpoints" / "step_00000001").mkdir(parents=True)
    for name, words in [
        ("absent", "no such directory"),
        ("run", "found in run: config.toml"),
        ("run/config.toml", "is a file"),
        ("run2", "found in checkpoints: nothing"),
        ("run3", "manifest.json is missing"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            checkpoint.resolve(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from p828.errors import RunFailed
from p828.runs import checkpoint
from p828.train import checkpoint_writer
directory = Path(sys.argv[1])
checkpoint_writer.save(directory, 1, {"model": {"a": torch.zeros(100)}}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit, state in [(100_000, {}), (2_000, {"losses": [0.0] * 1000})]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    size = 250_000 if not state else 10
    for step in (1, 2):
        try:
            checkpoint_writer.save(directory, step, {"model": {"a": torch.ones(size)}}, state)
        except RunFailed as error:
            print(error)
assert checkpoint.load(directory / "step_00000001").tensors["model"]["a"].sum() == 0
"""


def test_a_file_system_that_takes_no_more_is_named_and_nothing_stays(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write, as a full disk does, without needing a disk of one's own."""
    answer = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(answer) == 4
    for line, step, size in zip(answer, (1, 2, 1, 2), ("1 MB", "1 MB", "5.05 kB", "5.05 kB"), strict=True):
        assert line.startswith(f"{tmp_path}/step_{step:08d}: the checkpoint cannot be saved: File too large; ")
        assert f"it needs about {size}, " in line
    assert names(tmp_path) == ["step_00000001"]


def test_a_path_that_cannot_hold_checkpoints_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"Not a directory|File exists"):
        save(tmp_path / "file" / "checkpoints", 1)
    assert (tmp_path / "file").read_text() == ""


KILLED = """
import json, os, shutil, signal, sys, torch
from pathlib import Path
from p828.runs import checkpoint
from p828.train import checkpoint_writer

top = Path(sys.argv[1])
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"}
SAVED, REPLACED, PRUNED = "saved", "replaced", "pruned"

def save(directory, step, value, numel=1000):
    checkpoint_writer.save(directory, step, {"model": {"a": torch.full((numel,), float(value))}}, {"value": value})

def act(scenario, directory):
    if scenario == PRUNED:
        checkpoint.prune(directory, 1, None)
    else:
        save(directory, 3 if scenario == REPLACED else 4, 9)

def killed_at(moment, scenario, directory):
    '''Fork a child that dies by SIGKILL before its file-system call number `moment`; False if it has fewer.'''
    child = os.fork()
    if child == 0:
        calls = 0
        def count(event, arguments):
            nonlocal calls
            if event in CALLS:
                calls += 1
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        act(scenario, directory)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def outcome(directory):
    listed = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    newest, notes = checkpoint.find_newest(directory)
    loaded = checkpoint.load(newest)
    assert loaded.tensors["model"]["a"].unique().tolist() == [loaded.state["value"]]
    for path in directory.iterdir():
        checkpoint.verify(path)
    return [loaded.step, loaded.state["value"], notes, [p.name for p in directory.iterdir() if p.name.startswith(".")]]

for scenario in (SAVED, REPLACED, PRUNED):
    results, moment, killed = [], 0, True
    while killed:
        moment += 1
        directory = top / f"{scenario}{moment}"
        for step in ((3,) if scenario == REPLACED else (1, 2, 3)):
            save(directory, step, step)
        killed = killed_at(moment, scenario, directory)
        results.append(outcome(directory))
    print(json.dumps({scenario: results}))

# and wherever the signal falls while large files are written
results, directory = [], top / "running"
for kill in range(12):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        step = 10 * kill
        while True:
            step += 1
            os.write(writer, b".")
            save(directory, step // 2, step, numel=300_000)
            checkpoint.prune(directory, 2, None)
    for _ in range(3 + kill % 4):
        os.read(reader, 1)
    for _ in range(kill * 20_000):  # moves the moment through the save
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    results.append(outcome(directory))
print(json.dumps({"running": results}))
"""


def test_a_process_killed_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    """Real processes and SIGKILL, before every call of a save, a replacement and a pruning that touches the disk."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == 0, child.stderr
    outcomes = {key: value for line in child.stdout.splitlines() for key, value in json.loads(line).items()}
    assert all(notes == [] and left == [] for results in outcomes.values() for _, _, notes, left in results)
    newest = {key: [(step, value) for step, value, _, _ in results] for key, results in outcomes.items()}
    for scenario, before, after in [("saved", (3, 3), (4, 9)), ("replaced", (3, 3), (3, 9))]:
        moments = newest[scenario]
        turn = moments.index(after)
        assert turn > 8  # mkdir, four files written and read back, the renames
        assert moments == [before] * turn + [after] * (len(moments) - turn)
    assert set(newest["pruned"]) == {(3, 3)}
    assert len(newest["pruned"]) > 8
    assert len(newest["running"]) == 12


def test_the_newest_up_to_a_step_and_what_comes_after(tmp_path: Path) -> None:
    for step in (1, 3, 5, 7):
        save(tmp_path, step)
    assert checkpoint.find_newest(tmp_path, last_step=4) == (tmp_path / file_names.name_of(3), [])
    assert checkpoint.find_newest(tmp_path, last_step=0) == (None, [])
    checkpoint.forget_after(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file_names.name_of(step) for step in (1, 3)]
