"""ProcessGroup of one host compare each file of prepared data once, and end together if one is wrong."""

from pathlib import Path

import pytest
from launch import final_state, launched, the_message, train

from p828.cli.main import dispatch
from p828.data.tokens.format import open_manifest

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture
def prepared(config: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "prepared"
    flags = ["--data.prepared", str(directory), "--prepare.shard-tokens", "4000"]
    assert dispatch(["prepare", str(config), *flags]) == 0
    return directory


def test_a_damaged_file_that_another_rank_compares(config: Path, prepared: Path, tmp_path: Path) -> None:
    path = prepared / "training-00000.documents"  # the second file
    content = bytearray(path.read_bytes())
    content[9] ^= 2
    path.write_bytes(content)
    with launched(config, tmp_path / "runs" / "wrong", 1, 2, "--data.prepared", str(prepared)) as launch:
        assert "training-00000.documents: damaged or changed" in the_message(launch)
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_checkpoint_knows_what_every_rank_compared(config: Path, prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "right"
    train(config, run, 1, 2, "--data.prepared", str(prepared))
    checked = final_state(run).state["data"]["sources"][0]["checked"]
    shards = open_manifest(prepared).training
    assert sorted(checked) == sorted(shard.name + ending for shard in shards for ending in shard.checksums)
