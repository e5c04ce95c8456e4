"""The sharded engine on several ranks takes the step of one device, whatever is sharded."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import TOLERANCE, WITHIN

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from simulated_hosts import hosts_with_link, obstacle, run_on_nodes

pytestmark = pytest.mark.xdist_group("ranks")

WORKER = Path(__file__).with_name("sharded_worker.py")
Launches = Mapping[tuple[int, int, int], Sequence[str]]
"""From hosts, ranks on each and micro-batches of a rank to cases; only with several hosts are there replicas."""

QUICK: Launches = {
    (1, 2, 2): ("1", "2-tied", "3-auxiliary-recomputed"),
    (1, 3, 1): ("3",),
    (2, 2, 2): ("3-host",),
}
OPTIONS = ("", "-tied", "-auxiliary", "-recomputed")
ALL = {
    (1, 1, 2): OPTIONS, (1, 2, 1): OPTIONS, (1, 3, 2): OPTIONS, (1, 4, 1): OPTIONS, (2, 2, 1): ("-host-tied", "-host"),
    (2, 1, 2): ("-host", "-host-auxiliary"), (3, 1, 1): ("-host", "-host-recomputed"),
}  # fmt: skip
LONG = {launch: [f"{stage}{options}" for stage in (1, 2, 3) for options in kinds] for launch, kinds in ALL.items()}
# Of these the bytes alone are looked at, which are fewer than in float32.
QUICK_BFLOAT16: Launches = {(1, 2, 2): ("2-bfloat16",)}
LONG_BFLOAT16: Launches = {(1, 3, 2): ("1-bfloat16", "2-bfloat16-tied", "3-bfloat16", "3-bfloat16-tied")}


def parameters(quick: Launches, long: Launches) -> list[Any]:
    return [
        *(pytest.param(*launch, case) for launch, cases in quick.items() for case in cases),
        *(pytest.param(*launch, case, marks=pytest.mark.long) for launch, cases in long.items() for case in cases),
    ]


CASES = parameters(QUICK, LONG)


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From hosts, ranks on each, accumulation and case to what the worker found; all cases of a launch in one."""

    @cache
    def launched(hosts: int, ranks: int, accumulation: int) -> Path:
        launch = hosts, ranks, accumulation
        directory = tmp_path_factory.mktemp("sharded")
        kinds = QUICK, LONG, QUICK_BFLOAT16, LONG_BFLOAT16
        cases = [case for launches in kinds for case in launches.get(launch, ())]
        program = [str(WORKER), str(directory), str(accumulation), *cases]
        run_on_nodes([None] * hosts, ranks, program, 2 * WITHIN)
        return directory

    return lambda *launch, case: json.loads((launched(*launch) / f"{case}.json").read_text())


@pytest.mark.parametrize("hosts, ranks, accumulation, case", CASES)
def test_ranks_train_as_one_device_does(found: Any, hosts: int, ranks: int, accumulation: int, case: str) -> None:
    result = found(hosts, ranks, accumulation, case=case)
    *ours, our_evaluation = result["ours"]
    *theirs, their_evaluation = result["theirs"]
    assert len(ours) == 20
    assert [step[0] for step in ours] == pytest.approx([step[0] for step in theirs], abs=TOLERANCE)
    assert [step[1] for step in ours] == pytest.approx([step[1] for step in theirs], rel=TOLERANCE, abs=0)
    assert [step[2] for step in ours] == [step[2] for step in theirs]
    assert our_evaluation == pytest.approx(their_evaluation, abs=TOLERANCE)
    assert result["weights"] < 1e-4  # AdamW's division magnifies the order of sums
    assert result["bias_is_equal"]


@pytest.mark.parametrize("hosts, ranks, accumulation, case", CASES)
def test_samples_are_those_of_one_device_and_no_rank_holds_the_model_for_them(
    found: Any, hosts: int, ranks: int, accumulation: int, case: str
) -> None:
    """Rank 0 makes forward passes, and the others none.

    Beside its buffers, a rank makes room for the head at stage 3, and rank 0 for keys, values and activations, which
    are large beside this model.
    """
    result = found(hosts, ranks, accumulation, case=case)
    assert result["samples"] == result["their_samples"]
    assert [len(tokens) for tokens in result["samples"]] == [9, 13, 10, 16]
    (first,), *others = result["peak_bytes"]
    head, whole = result["unit_bytes"][-1], sum(result["unit_bytes"])
    if case[0] == "3":
        assert first < whole / 2
        assert all(other < head + 1000 for (other,) in others)
        assert result["evaluation_bytes"] < result["their_evaluation_bytes"] + head + 1000, "activations, and the head"


@pytest.mark.parametrize("hosts, ranks, accumulation, case", CASES)
def test_ranks_make_as_many_forward_passes_as_they_like(
    found: Any, hosts: int, ranks: int, accumulation: int, case: str
) -> None:
    """Rank r makes r of them, and fails."""
    result = found(hosts, ranks, accumulation, case=case)
    for rank, losses in enumerate(result["any_passes"]):
        assert losses == pytest.approx(result["single_losses"][:rank], abs=TOLERANCE)


@pytest.mark.parametrize("hosts, ranks, accumulation, case", CASES)
def test_a_step_that_is_not_finite_changes_nothing(
    found: Any, hosts: int, ranks: int, accumulation: int, case: str
) -> None:
    """The gradient of one rank alone is infinite."""
    result = found(hosts, ranks, accumulation, case=case)
    assert not result["applied"]
    assert result["unchanged"]


@pytest.mark.parametrize("hosts, ranks, accumulation, case", CASES)
def test_every_stage_and_the_plain_engine_go_on(
    found: Any, hosts: int, ranks: int, accumulation: int, case: str
) -> None:
    """At the same stage bit for bit; at others a step's micro-batches are added in another order."""
    result = found(hosts, ranks, accumulation, case=case)
    assert result["same_bits"]
    loss, norm, loads = result["after"]
    assert len(result["resumed"]) == (7 if "host" in case else 4)
    for step in result["resumed"]:
        assert step == [pytest.approx(loss, abs=TOLERANCE), pytest.approx(norm, rel=TOLERANCE, abs=0), loads]


@pytest.mark.parametrize("hosts, ranks, accumulation, case", [*CASES, *parameters(QUICK_BFLOAT16, LONG_BFLOAT16)])
def test_the_bytes_of_a_step(found: Any, hosts: int, ranks: int, accumulation: int, case: str) -> None:
    """What docs/distributed.md has in its table. At stage 3 a layer that is still in a buffer is not gathered again."""
    result = found(hosts, ranks, accumulation, case=case)
    within = passed_within(result, accumulation, case)
    if result["shards"] == 1:
        within = dict.fromkeys(within, 0)
    across = sum(result["unit_bytes"]) // result["shards"] if hosts > 1 else 0
    beside = result["small_bytes"] * (hosts * ranks > 1) + result["totals_bytes"]
    passed = {key: sum(n for name, n in result["passed"].items() if name.startswith(key)) for key in within}
    assert passed == within
    assert sum(result["passed"].values()) - sum(passed.values()) == across + beside
    assert beside < 0.1 * sum(result["unit_bytes"]), "norms, routers and loads are little"


def passed_within(result: Any, accumulation: int, case: str) -> dict[str, int]:
    """Bytes that a rank passes to collective operations with those that it shares a replica with, by operation.

    `unit_bytes` are those of float32. Weights, and the gradients that are exchanged, may be bfloat16.
    """
    stage, layers, buffers = int(case[0]), 3, 2
    narrower = 2 if "bfloat16" in case else 1
    layer, whole = result["unit_bytes"][1], sum(result["unit_bytes"])
    vocabulary = whole - layers * layer
    exchanged = 0 if stage == 1 else accumulation * layers * layer
    gathered = whole
    if stage == 3:
        of_vocabulary = vocabulary if "tied" in case else accumulation * vocabulary
        gathered = of_vocabulary + (buffers + accumulation * 2 * (layers - buffers)) * layer
    scattered = whole if stage == 1 else vocabulary
    return {
        "all_to_all": exchanged // narrower,
        "reduce_scatter": scattered,
        "all_gather": gathered // narrower,
    }


LINKED = [f"{stage}{kind}-wide" for stage in (1, 2, 3) for kind in ("", "-host")]
GLOO_SCATTERS = 2  # PyTorch has gloo reduce and scatter by reducing everything to everyone


@pytest.fixture(scope="session")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the worker found on two hosts of two ranks, with a link of 200 Mbit a second between them."""
    if reason := obstacle():
        pytest.skip(f"hosts cannot be simulated: {reason}")
    directory = tmp_path_factory.mktemp("linked")
    with hosts_with_link(200) as hosts:
        run_on_nodes(hosts, 2, [str(WORKER), str(directory), "2", *LINKED], 4 * WITHIN)
    return directory


@pytest.mark.long
@pytest.mark.parametrize("case", LINKED)
def test_the_bytes_between_hosts(linked: Path, case: str) -> None:
    """What docs/distributed.md has of them, beside what the link counted. TCP and smaller messages add a little."""
    result = json.loads((linked / f"{case}.json").read_text())
    losses = [[step[0] for step in result[key][:-1]] for key in ("ours", "theirs")]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    assert result["same_bits"]
    hosts, ranks = 2, 4
    share = (ranks - 1) / ranks
    expected = 2 * share * (result["small_bytes"] + result["totals_bytes"])
    if "host" in case:
        expected += 2 * (hosts - 1) / hosts * sum(result["unit_bytes"])
    else:
        within = passed_within(result, 2, case)
        expected += within["all_gather"] * share + within["reduce_scatter"] * share * GLOO_SCATTERS
        expected += within["all_to_all"] * (ranks // hosts) * (hosts - 1) / hosts
    assert expected < result["over_link"] < 1.03 * expected


def test_nothing_is_left_of_simulated_hosts() -> None:
    """Their processes are killed where the block ends with an error, and the namespaces go with them."""
    if reason := obstacle():
        pytest.skip(f"hosts cannot be simulated: {reason}")
    interfaces = psutil.net_if_addrs().keys()
    started: list[subprocess.Popen[bytes]] = []

    def work() -> None:
        with hosts_with_link(100) as hosts:
            assert [host.call("hostname") for host in hosts] == ["p828-host-0\n", "p828-host-1\n"]
            started.extend(subprocess.Popen(host.command("sleep", "1000")) for host in hosts)
            subprocess.run(["false"], check=True)

    with pytest.raises(subprocess.CalledProcessError):
        work()
    assert [process.wait(WITHIN) for process in started] == [-9, -9]
    assert psutil.net_if_addrs().keys() == interfaces
