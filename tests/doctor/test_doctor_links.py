"""What is said of links, by kind and by what was measured; and an all-reduce among real processes."""

import os
from dataclasses import replace
from typing import Literal

import psutil
import pytest

from p828.config import Config, load, with_vocabulary
from p828.distributed.topology import Topology
from p828.doctor.all_reduce import measured_all_reduce
from p828.doctor.links import check_links, gradient_of
from p828.errors import RunFailed
from p828.model.costs import count_parameters

HERE = frozenset(os.sched_getaffinity(0))
DEEPSPEED = replace(load("60m"), engine="deepspeed")


def at(gigabytes: float, gpus: int = 2) -> float:
    """Seconds for a byte of an all-reduce at this bus bandwidth."""
    return 2 * (gpus - 1) / gpus / (gigabytes * 1e9)


@pytest.mark.parametrize(
    "kind, where", [("NODE", "between host bridges of a processor"), ("SYS", "between processors")]
)
@pytest.mark.parametrize("seconds", [None, at(5.0)], ids=["assumed", "measured"])
def test_a_slow_link_is_named_with_its_cost_and_what_to_set(kind: str, where: str, seconds: float | None) -> None:
    (check,) = check_links(Topology({(0, 1): kind}), 2, seconds, DEEPSPEED)
    assert check.status == "warning"
    assert f"GPU0-GPU1 is connected by {kind} ({where})" in check.text
    gigabytes = 4 * count_parameters(with_vocabulary(DEEPSPEED).model).total / 1e9  # in float32
    cost = gigabytes / (6.0 if seconds is None else 5.0)
    assert f"takes {cost:.3g} s" in check.text
    assert ("as usual" in check.text) == (seconds is None)
    assert "NCCL_P2P_LEVEL=SYS" in check.remedy
    assert "--train.gradient-accumulation" in check.remedy
    assert f"in less than {cost:.3g} s" in check.remedy


@pytest.mark.parametrize("kind, rate", [("NV18", 216), ("NV4", 48), ("PIX", 12), ("PXB", 12), ("PHB", 12)])
def test_other_links_are_fine_unless_they_are_measured_to_be_slow(kind: str, rate: float) -> None:
    topology = Topology({(0, 1): kind})
    (fine,) = check_links(topology, 2, at(2.0 * rate), None)
    assert (fine.status, fine.remedy) == ("ok", "")
    assert f"{2 * rate:.3g} GB/s" in fine.text
    (slow,) = check_links(topology, 2, at(0.1 * rate), None)
    assert slow.status == "warning"
    assert f"far less than is usual over {kind}" in slow.text
    assert "NCCL" in slow.remedy


def test_links_that_are_not_known_are_measured_or_warned_of() -> None:
    assert [check.status for check in check_links(Topology(), 4, at(50.0, 4), None)] == ["ok"]
    assert [check.status for check in check_links(Topology(), 4, None, None)] == ["warning"]
    assert check_links(Topology(), 1, None, None) == []


def test_a_slow_pair_that_nccl_goes_round_is_told_and_costs_nothing() -> None:
    links = {(0, 1): "NV2", (1, 2): "NV2", (0, 2): "SYS"}
    (check,) = check_links(Topology(links), 3, at(30.0, 3), None)
    assert check.status == "ok"
    assert "GPU0-GPU2" in check.text


def test_a_process_that_may_not_run_near_its_gpu_is_warned() -> None:
    (near,) = check_links(Topology(cpus={0: HERE}, numa={0: "0"}), 1, None, None)
    assert (near.name, near.status) == ("processors", "ok")
    (far,) = check_links(Topology(cpus={0: HERE, 1: frozenset({max(HERE) + 5000})}, numa={1: "3"}), 1, None, None)
    assert far.status == "warning"
    assert "GPU1" in far.text
    assert "--cpunodebind=3" in far.remedy


def test_a_far_network_card_is_told() -> None:
    (near,) = check_links(Topology(cards={"mlx5_0": {0: "PIX"}}), 1, None, None)
    assert "GPU0: mlx5_0 (PIX)" in near.text
    assert near.remedy == ""
    (far,) = check_links(Topology(cards={"mlx5_0": {0: "SYS"}}), 1, None, None)
    assert "NCCL_NET_GDR_LEVEL" in far.remedy


def test_the_gradient_is_what_the_engine_sums() -> None:
    numbers = count_parameters(with_vocabulary(DEEPSPEED).model).total
    micro_batches = DEEPSPEED.train.gradient_accumulation
    assert gradient_of(DEEPSPEED, 2) == (4 * numbers, 1)
    second = replace(DEEPSPEED, deepspeed=replace(DEEPSPEED.deepspeed, stage=2))
    assert gradient_of(second, 2) == (2 * numbers, micro_batches)
    assert gradient_of(None, 2)[1] == gradient_of(Config(), 2)[1] == 1


@pytest.mark.parametrize(
    "engine, stage, dtype, size, is_once",
    [
        ("plain", 3, "auto", 4, True),
        ("sharded", 1, "auto", 4, True),
        ("sharded", 2, "auto", 2, False),
        ("sharded", 3, "bfloat16", 2, False),
        ("sharded", 3, "float32", 4, False),
        ("deepspeed", 3, "auto", 4, True),
    ],
)
def test_the_stage_is_that_of_the_engine_in_use(
    engine: Literal["plain", "sharded", "deepspeed"],
    stage: int,
    dtype: Literal["auto", "float32", "bfloat16"],
    size: int,
    is_once: bool,
) -> None:
    """The other engine's section has another stage."""
    config = replace(DEEPSPEED, engine=engine, train=replace(DEEPSPEED.train, dtype=dtype))
    config = replace(
        config,
        sharded=replace(config.sharded, stage=stage),
        deepspeed=replace(config.deepspeed, stage=1 if engine == "deepspeed" else 4 - stage),
    )
    numbers = count_parameters(with_vocabulary(config).model).total
    expected = size * numbers, 1 if is_once else config.train.gradient_accumulation
    assert gradient_of(config, 2) == expected
    within_host = replace(config, sharded=replace(config.sharded, shard_within="host"))
    assert gradient_of(within_host, 2) == expected, "sums over hosts take no link between these GPUs"


def test_processes_sum_and_are_timed() -> None:
    assert 0 < measured_all_reduce(2, backend="gloo") < 1e-3


def test_processes_that_do_not_get_through_are_ended() -> None:
    with pytest.raises(RunFailed, match="do not get through"):
        measured_all_reduce(2, backend="gloo", within=0.0)
    started = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not [words for words in started if "spawn_main" in " ".join(words)]
