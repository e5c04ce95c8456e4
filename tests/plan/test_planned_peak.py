"""Predicted memory: beside what an H100 measured, and as it grows with the micro-batch."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from p828.config import Config, load, with_vocabulary
from p828.plan.peak import Memory, peak
from p828.plan.room import largest_micro_batch, recomputing
from p828.plan.setup import Setup, deepspeed_setup, plain_setup, sharded_setup
from p828.system.cards import card

ROOT = Path(__file__).parents[2]
NUMBER = r"\*?([\d.]+)\*?"
ROW = re.compile(
    rf"\| ([^|]+?)(?:, (sharded|deepspeed) (\d) on (\d))? \| {NUMBER} \| {NUMBER} \| [^|]+ \| {NUMBER} \| {NUMBER} \|"
)
ROWS = [found.groups() for found in map(ROW.match, (ROOT / "docs" / "plan.md").read_text().splitlines()) if found]
WITHOUT_RESERVED = re.compile(rf"\| \*(800m), (sharded|deepspeed) (\d) on (\d)\* \| {NUMBER} \| {NUMBER} \| ")
WITHIN = 0.1


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark that measured, which has the configurations."""
    sys.path.insert(0, str(ROOT / "benchmarks"))  # it imports the one of several GPUs
    return importlib.import_module("planned_memory")


def test_there_are_rows() -> None:
    assert len([row for row in ROWS if row[1] is None]) == 8


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_the_documented_predictions_are_today_s_and_near_what_was_measured(
    script: ModuleType, row: tuple[str, ...]
) -> None:
    name, engine, stage, ranks, *gigabytes = row
    allocated, measured, reserved, measured_reserved = map(float, gigabytes)
    job = script.make_job(name, engine or "plain", int(stage) if stage else None, int(ranks or 1), is_tiny=False)
    assert job["predicted"]["allocated"] / 1e9 == pytest.approx(allocated, abs=0.006)
    assert job["predicted"]["reserved"] / 1e9 == pytest.approx(reserved, abs=0.006)
    assert allocated == pytest.approx(measured, rel=WITHIN)
    assert reserved == pytest.approx(measured_reserved, rel=WITHIN)


def test_rows_without_reserved_memory(script: ModuleType) -> None:
    rows = WITHOUT_RESERVED.findall((ROOT / "docs" / "plan.md").read_text())
    assert len(rows) == 7
    for name, engine, stage, ranks, allocated, measured in rows:
        job = script.make_job(name, engine, int(stage), int(ranks), is_tiny=False)
        assert job["predicted"]["allocated"] / 1e9 == pytest.approx(float(allocated), abs=0.006)
        assert float(allocated) == pytest.approx(float(measured), rel=WITHIN)


def preset(name: str) -> Config:
    return with_vocabulary(load(name))


def setups(config: Config) -> list[Setup]:
    of_ranks = [deepspeed_setup(config, stage, 2) for stage in (0, 1, 2, 3)]
    return [plain_setup(config), *(sharded_setup(config, stage, 2) for stage in (1, 2, 3)), *of_ranks]


@pytest.mark.parametrize("name", ["60m", "fine-grained", "planned"])
def test_the_largest_micro_batch_fits_and_the_next_does_not(name: str) -> None:
    config, room = preset(name), card("a100").memory_bytes
    for setup in setups(config):
        largest = largest_micro_batch(config, setup, room)
        assert largest > 0
        assert peak(config, setup, largest).total <= room < peak(config, setup, largest + 1).total
    assert largest_micro_batch(config, plain_setup(config), 10**8) == 0


def test_recomputation_and_offloading_take_less() -> None:
    config = preset("800m")
    for setup in setups(config):
        assert peak(recomputing(config), setup, 8).total < peak(config, setup, 8).total
    stage_3 = deepspeed_setup(config, 3, 2)
    offloaded = stage_3._replace(offload_optimizer=True, offload_param=True)
    less = peak(config, stage_3, 8).total - peak(config, offloaded, 8).total
    parameters = 811_692_288
    assert less == pytest.approx((2 + 4 + 12) / 2 * parameters, rel=1e-3)


def test_parts_add_up() -> None:
    memory = peak(preset("60m"), Setup(), 8)
    outside = memory.evaluation + memory.context + memory.recordings
    assert memory.total == sum(memory.parts().values()) == memory.reserved + outside
    assert memory.reserved == memory.allocated + memory.fragmentation
    assert set(memory.parts()) == {one.name for one in dataclasses.fields(Memory)} - {"moment"}


def test_a_deepspeed_file_s_settings_are_planned_with(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "overlap_comm": false, '
        '"stage3_max_live_parameters": 7, "offload_optimizer": {"device": "cpu"}}}'
    )
    config = preset("60m")
    deepspeed = dataclasses.replace(config.deepspeed, config=str(tmp_path / "ds.json"))
    config = dataclasses.replace(config, engine="deepspeed", deepspeed=deepspeed)
    assert deepspeed_setup(config, 3, 4) == Setup(
        3, 4, offload_optimizer=True, bucket_numbers=1000, has_two_buckets=False, live_numbers=7
    )
