"""The ZeRO stage of a run that goes on, by `p828 train runs/NAME`, on another number of GPUs."""

from pathlib import Path

import pytest
from launch import launched, torchrun

from p828.config import load

pytestmark = pytest.mark.xdist_group("ranks")


def go_on(config: Path, run: Path, ranks: int, steps: int, *flags: str) -> str:
    """Train to a step, on this number of processes; what was printed."""
    launcher = torchrun(ranks) if ranks > 1 else ()
    with launched(config, run, None, ranks, "--train.steps", str(steps), *flags, launcher=launcher) as launch:
        code, out, err = launch.end()
    assert code == 0, err
    return out


@pytest.mark.long
def test_one_that_p828_chose_is_chosen_again(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "chosen"
    assert '2 processes: engine = "sharded", ZeRO stage 1' in go_on(config, run, 2, 3)
    assert load(str(run)).sharded.stage_chosen_for == 2
    assert '3 processes in place of 2: engine = "sharded", ZeRO stage 1' in go_on(run, run, 3, 4)
    assert load(str(run)).sharded.stage_chosen_for == 3
    assert "engine = 'sharded', now 'plain'" in go_on(run, run, 1, 5)
    assert load(str(run)).engine == "plain"


@pytest.mark.long
def test_one_that_was_given_stays_until_p828_is_asked_to_choose(config: Path, tmp_path: Path) -> None:
    """So does one of which a run does not tell who chose it, as runs of before did not."""
    run = tmp_path / "runs" / "given"
    go_on(config, run, 2, 3, "--sharded.stage", "3")
    said = go_on(run, run, 3, 4)
    assert "ranks = 2, now 3: sharded.stage = 3 is kept; --sharded.stage-chosen-for 2 has p828 choose one" in said
    assert load(str(run)).sharded.stage == 3
    assert '3 processes in place of 2: engine = "sharded", ZeRO stage 1' in go_on(
        run, run, 3, 5, "--sharded.stage-chosen-for", "2"
    )
    assert (load(str(run)).sharded.stage, load(str(run)).sharded.stage_chosen_for) == (1, 3)
