"""Several ranks go back together, to where one device would."""

import random
from pathlib import Path

import pytest
from launch import SHARDED, TOLERANCE, Stage, records_of, steps, train, write_config

from runs import write_text

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.long]


@pytest.mark.parametrize("stage", [0, 1, 2, 3, *SHARDED])
def test_ranks_are_rolled_back_as_one_device_is(tmp_path: Path, stage: Stage) -> None:
    text = write_text(tmp_path / "text", documents=30)
    noise = random.Random(3).choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=1100)
    (text / "noise.txt").write_text("".join(noise))
    config = write_config(
        tmp_path,
        data={"shuffle_rows": 1, "block_documents": 1},
        train={"steps": 40},
        evaluation={"every": 0},
        rollback={"after_steps": 2, "spike_threshold": 0.5},
    )
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    train(config, one, None, 1)
    train(config, two, stage, 2)
    events = [[line["text"] for line in records_of(run, "event") if line["event"] == "rollback"] for run in (one, two)]
    assert len(events[0]) > 0
    assert [text.split("(")[0] for text in events[0]] == [text.split("(")[0] for text in events[1]]
    first, second = steps(one), steps(two)
    for key in ("step", "tokens", "documents"):
        assert [line[key] for line in first] == [line[key] for line in second], key
    assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], abs=TOLERANCE)
