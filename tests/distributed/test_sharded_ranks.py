"""The sharded engine on several ranks takes the step of one device, whatever is sharded."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from launch import TOLERANCE, WITHIN, torchrun

pytestmark = pytest.mark.xdist_group("ranks")

WORKER = Path(__file__).with_name("sharded_worker.py")
QUICK = {2: ("1", "2-tied", "3-auxiliary-recomputed"), 3: ("1-tied", "3")}
ALL = [f"{stage}{options}" for stage in (1, 2, 3) for options in ("", "-tied", "-auxiliary", "-recomputed")]
CASES = [
    *(pytest.param(ranks, 1 if ranks == 3 else 2, case) for ranks, cases in QUICK.items() for case in cases),
    *(
        pytest.param(ranks, accumulation, case, marks=pytest.mark.long)
        for ranks, accumulation in ((1, 2), (2, 1), (3, 2), (4, 1))
        for case in ALL
    ),
]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From ranks, accumulation and case to what the worker found; all cases of a launch in one."""

    @cache
    def launched(ranks: int, accumulation: int) -> Path:
        directory = tmp_path_factory.mktemp(f"sharded-{ranks}-{accumulation}")
        is_quick = ranks in QUICK and accumulation == (1 if ranks == 3 else 2)
        quick = QUICK[ranks] if is_quick else ALL
        command = [sys.executable, *torchrun(ranks, str(WORKER)), str(directory), str(accumulation), *quick]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * WITHIN)
        assert done.returncode == 0, done.stderr
        return directory

    return lambda ranks, accumulation, case: json.loads((launched(ranks, accumulation) / f"{case}.json").read_text())


@pytest.mark.parametrize("ranks, accumulation, case", CASES)
def test_ranks_train_as_one_device_does(found: Any, ranks: int, accumulation: int, case: str) -> None:
    result = found(ranks, accumulation, case)
    *ours, our_evaluation = result["ours"]
    *theirs, their_evaluation = result["theirs"]
    assert len(ours) == 20
    assert [step[0] for step in ours] == pytest.approx([step[0] for step in theirs], abs=TOLERANCE)
    assert [step[1] for step in ours] == pytest.approx([step[1] for step in theirs], rel=TOLERANCE, abs=0)
    assert [step[2] for step in ours] == [step[2] for step in theirs]
    assert our_evaluation == pytest.approx(their_evaluation, abs=TOLERANCE)
    assert result["weights"] < 1e-4  # AdamW's division magnifies the order of sums
    assert result["bias_is_equal"]


@pytest.mark.parametrize("ranks, accumulation, case", CASES)
def test_samples_are_those_of_one_device_and_no_rank_holds_the_model_for_them(
    found: Any, ranks: int, accumulation: int, case: str
) -> None:
    """Rank 0 makes forward passes, and the others none.

    Beside its buffers, a rank makes room for the head at stage 3, and rank 0 for keys, values and activations, which
    are large beside this model.
    """
    result = found(ranks, accumulation, case)
    assert result["samples"] == result["their_samples"]
    assert [len(tokens) for tokens in result["samples"]] == [9, 13, 10, 16]
    (first,), *others = result["peak_bytes"]
    head, whole = result["unit_bytes"][-1], sum(result["unit_bytes"])
    if case[0] == "3":
        assert first < whole / 2
        assert all(other < head + 1000 for (other,) in others)
        assert result["evaluation_bytes"] < result["their_evaluation_bytes"] + head + 1000, "activations, and the head"


@pytest.mark.parametrize("ranks, accumulation, case", CASES)
def test_ranks_make_as_many_forward_passes_as_they_like(found: Any, ranks: int, accumulation: int, case: str) -> None:
    """Rank r makes r of them, and fails."""
    result = found(ranks, accumulation, case)
    for rank, losses in enumerate(result["any_passes"]):
        assert losses == pytest.approx(result["single_losses"][:rank], abs=TOLERANCE)


@pytest.mark.parametrize("ranks, accumulation, case", CASES)
def test_a_step_that_is_not_finite_changes_nothing(found: Any, ranks: int, accumulation: int, case: str) -> None:
    """The gradient of one rank alone is infinite."""
    result = found(ranks, accumulation, case)
    assert not result["applied"]
    assert result["unchanged"]


@pytest.mark.parametrize("ranks, accumulation, case", CASES)
def test_every_stage_and_the_plain_engine_go_on(found: Any, ranks: int, accumulation: int, case: str) -> None:
    """At the same stage bit for bit; at others a step's micro-batches are added in another order."""
    result = found(ranks, accumulation, case)
    assert result["same_bits"]
    loss, norm, loads = result["after"]
    assert len(result["resumed"]) == 4
    for step in result["resumed"]:
        assert step == [pytest.approx(loss, abs=TOLERANCE), pytest.approx(norm, rel=TOLERANCE, abs=0), loads]


@pytest.mark.parametrize("ranks, accumulation, case", CASES)
def test_the_bytes_of_a_step(found: Any, ranks: int, accumulation: int, case: str) -> None:
    """What docs/distributed.md has in its table. At stage 3 a layer that is still in a buffer is not gathered again."""
    result = found(ranks, accumulation, case)
    stage, layers, buffers = int(case[0]), 3, 2
    layer, whole = result["unit_bytes"][1], sum(result["unit_bytes"])
    vocabulary = whole - layers * layer
    exchanged = 0 if stage == 1 else accumulation * layers * layer
    gathered = whole
    if stage == 3:
        of_vocabulary = vocabulary if "tied" in case else accumulation * vocabulary
        gathered = of_vocabulary + (buffers + accumulation * 2 * (layers - buffers)) * layer
    expected = {"all_to_all": exchanged, "reduce_scatter": whole if stage == 1 else vocabulary, "all_gather": gathered}
    passed = {key: sum(n for name, n in result["passed"].items() if name.startswith(key)) for key in expected}
    assert passed == (expected if ranks > 1 else dict.fromkeys(expected, 0))
    assert sum(result["passed"].values()) - sum(passed.values()) < 0.1 * whole, "norms, routers and loads are little"
