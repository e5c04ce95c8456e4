"""The recommendation: it fits, keeps the step, and is the simplest of the fast ways."""

import dataclasses
import re
from pathlib import Path

import pytest

from p828.config import Config, load, with_vocabulary
from p828.model.costs import flops_per_token
from p828.plan.advice import ADVISED_SHARE, advise
from p828.plan.learning_rate import caveat, learning_rate
from p828.plan.links import LinkBytes, link_bytes
from p828.plan.plan import Machine, make_plan
from p828.plan.setup import Setup
from p828.plan.speed import BETWEEN_STEPS, LARGE_EXPERTS, LINK_SHARE, step_time
from p828.system.cards import card


def preset(name: str) -> Config:
    return with_vocabulary(load(name))


@pytest.mark.parametrize(
    "name, gpu, gpus, stage, recomputes",
    [
        ("800m", "h100", 1, None, False),
        ("800m", "h100", 4, 1, False),
        ("800m", "4090", 1, None, False),
        ("planned", "h100", 1, None, True),
        ("planned", "4090", 8, 3, True),
        ("planned", "4090", 1, 3, True),
    ],
)
def test_advised_ways(name: str, gpu: str, gpus: int, stage: int | None, recomputes: bool) -> None:
    plan = make_plan(preset(name), Machine(card(gpu), gpus))
    advice = advise(plan)
    assert advice.setup is not None
    assert (advice.setup.stage, advice.gradient_checkpointing) == (stage, recomputes)
    assert advice.memory_bytes <= ADVISED_SHARE * card(gpu).memory_bytes
    rows = advice.micro_batch_size * advice.gradient_accumulation * gpus
    assert rows == preset(name).train.micro_batch_size * preset(name).train.gradient_accumulation


def test_what_fits_is_not_offloaded() -> None:
    config = preset("800m")
    deepspeed = dataclasses.replace(config.deepspeed, config="zero3-offload")
    config = dataclasses.replace(config, engine="deepspeed", deepspeed=deepspeed)
    plan = make_plan(config, Machine(card("h100"), 2))
    advice = advise(plan)
    assert plan.configured.setup.offload_optimizer
    assert advice.flags.startswith("--engine deepspeed --deepspeed.stage 1 --train.micro-batch-size")


def test_what_fits_nowhere_is_told_how_many_gpus_it_takes() -> None:
    config = preset("planned")
    model = dataclasses.replace(config.model, hidden_size=4096, n_routed_experts=64, num_hidden_layers=48)
    advice = advise(make_plan(dataclasses.replace(config, model=model), Machine(card("h100"), 8)))
    assert advice.setup is None
    assert advice.gpus_needed > 8


def test_the_step_keeps_its_tokens_on_several_gpus() -> None:
    one, eight = (make_plan(preset("800m"), Machine(card("h100"), gpus)) for gpus in (1, 8))
    assert eight.tokens_per_step == one.tokens_per_step
    assert eight.config.train.gradient_accumulation == 2
    assert eight.remarks == ['on 8 GPUs with engine = "sharded", train.gradient_accumulation 2 on each in place of 16']
    assert one.hours / 8 < eight.hours < one.hours / 6


def test_where_no_engine_is_named_the_lowest_stage_that_fits_is_planned() -> None:
    """As training chooses it; one that is named stays."""
    plan = make_plan(preset("planned"), Machine(card("5090"), 8))
    assert [engine.fits for engine in plan.engines] == [False, False, True, True]
    assert plan.configured is plan.engines[2]
    named = make_plan(dataclasses.replace(preset("planned"), engine="sharded"), Machine(card("5090"), 8))
    assert named.configured is named.engines[1]
    assert named.tokens_per_step == 8 * plan.tokens_per_step
    assert named.remarks == ["on 8 GPUs with train.gradient_accumulation 64 on each"]


def test_more_gpus_than_a_host_has_are_asked_about() -> None:
    """And of several hosts it is told how their links count."""
    assert make_plan(preset("800m"), Machine(card("h100"), 16)).remarks[-1].startswith("more than 8 GPUs of one host")
    assert "links between hosts" in make_plan(preset("800m"), Machine(card("h100"), 16, hosts=2)).remarks[-1]
    assert len(make_plan(preset("800m"), Machine(card("h100"), 8)).remarks) == 1


def test_a_step_that_cannot_be_divided_is_told_of() -> None:
    plan = make_plan(preset("800m"), Machine(card("h100"), 3))
    assert plan.tokens_per_step == 3 * 5 * 8 * 2048 == 245_760
    assert plan.remarks[0].endswith(": a step has 245,760 tokens in place of 262,144")


def test_a_run_of_some_hours_ends_with_them() -> None:
    config = preset("800m")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, hours=10))
    plan = make_plan(config, Machine(card("h100")))
    assert plan.hours == pytest.approx(10, rel=1e-3)
    assert plan.sources[0].planned == plan.tokens == plan.config.train.steps * 262_144
    assert plan.remarks == [f"train.hours = 10 ends the run after about {plan.config.train.steps:,} of 500,000 steps"]


FITS = {275: 2.13e-3, 480: 9.58e-4, 810: 6.21e-4, 1200: 4.83e-4}  # OLMo-core's LR_FITS.md, 256k tokens a step


def test_the_law_of_the_learning_rate() -> None:
    for millions, fitted in FITS.items():
        assert learning_rate(millions * 10**6) == pytest.approx(fitted, rel=0.2)
    assert learning_rate(275_000_000) == 2e-3
    assert learning_rate(550_000_000) == pytest.approx(1e-3)
    assert learning_rate(57_000_000) == 2e-3


def test_where_the_law_says_nothing() -> None:
    short = 5 * 10**9
    assert caveat(300_000_000, 262_144, short) == ""
    assert caveat(57_000_000, 262_144, short // 10) == "this model has 57 M"
    assert caveat(300_000_000, 1024, short) == "these steps have 1k"
    assert caveat(300_000_000, 262_144, 10 * short).startswith("this run has 167 for an active parameter")


def test_bytes_over_the_links() -> None:
    """The tables of docs/distributed.md, for a model of 1,000 parameters on 4 GPUs in steps of 8 micro-batches."""
    share = 3 / 4 * 1000
    for stage, size in {1: (4 + 2) * share, 2: (8 * 2 + 2) * share, 3: (8 * 2 + 8 * 4) * share}.items():
        assert link_bytes(Setup(stage, 4, is_sharded=True), 1000, 8).total == size
    expected = {0: 4 * 2 * share, 1: (4 + 2) * share, 2: (8 * 2 + 2) * share, 3: (8 * 2 + 8 * 2) * share}
    for stage, size in expected.items():
        assert link_bytes(Setup(stage, 4), 1000, 8).total == size
    assert link_bytes(Setup(3, 4, live_numbers=10), 1000, 8).total == (8 * 2 + 2 * 8 * 2) * share
    of_hosts = [Setup(stage, 8, is_sharded=True, hosts=2) for stage in (1, 2, 3)]
    # Each of four ranks sends half of its gradients away; a ring of eight crosses a host's link once.
    sent = [(4 + 2) * 7 / 8, 8 * 2 * 4 / 2 + 2 * 7 / 8, 8 * 2 * 4 / 2 + 8 * 2 * 2 * 7 / 8]
    assert [link_bytes(setup, 1000, 8).between_hosts for setup in of_hosts] == [1000 * size for size in sent]
    within = [link_bytes(setup._replace(shards_within_hosts=True), 1000, 8) for setup in of_hosts]
    assert [link.between_hosts for link in within] == [2 * 4 / 2 * 1000] * 3
    assert [link.gathered for link in within] == [size * 3 / 4 * 1000 for size in (2, 2, 8 * 4)]
    assert link_bytes(Setup(), 1000, 8).total == link_bytes(Setup(1, 1), 1000, 8).total == 0


def test_what_the_sharded_engine_s_links_add() -> None:
    """Beside computing a share of their time, and all of it beyond; at stage 1 beside one micro-batch of four."""
    config = preset("800m")
    one = step_time(config, Setup(), card("h100"), LinkBytes(0, 0), 8, 1, LARGE_EXPERTS).computing
    for rate, hosts, slowed in (100e9, 1, 0.1), (100e9, 2, 0.4), (10e9, 1, 0.4):  # NVLink, several hosts, PCIe
        linked = card("h100")._replace(link_rate=rate / LINK_SHARE)
        for stage, covering in {1: one, 2: 4 * one, 3: 4 * one}.items():
            setup = Setup(stage, 2 * hosts, is_sharded=True, hosts=hosts)
            for seconds in (one / 2, 6 * one):
                link = LinkBytes(seconds * 0.6 * rate, seconds * 0.4 * rate)
                found = step_time(config, setup, linked, link, 8, 4, LARGE_EXPERTS).links
                covered = min(seconds, covering)
                assert found == pytest.approx(slowed * covered + seconds - covered + 0.025 * 4 * one)


SHARES = re.compile(r"\| sharded, stage (\d) \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \|")


def test_the_documented_shares_of_plain_s_rate_are_today_s_and_near_what_was_measured() -> None:
    rows = SHARES.findall((Path(__file__).parents[2] / "docs" / "plan.md").read_text())
    assert [row[0] for row in rows] == ["1", "2", "3"]
    config = preset("800m")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_accumulation=4))
    alone = make_plan(config, Machine(card("h200"))).configured.time.seconds
    for stage, *shares in rows:
        for gpus, planned, measured in (2, *shares[:2]), (4, *shares[2:]):
            plan = make_plan(dataclasses.replace(config, engine="sharded"), Machine(card("h200"), gpus))
            assert 100 * alone / plan.engines[int(stage)].time.seconds == pytest.approx(float(planned), abs=0.06)
            assert float(planned) == pytest.approx(float(measured), rel=0.03)


def test_a_step_takes_its_flops_at_the_rate() -> None:
    config, h100 = preset("800m"), card("h100")
    none = link_bytes(Setup(), 1, 1)
    time = step_time(config, Setup(), h100, none, 8, 16, LARGE_EXPERTS)
    flops = 16 * 8 * 2048 * flops_per_token(config.model, 2048)
    assert time.computing == pytest.approx(flops / (LARGE_EXPERTS * h100.peak_flops))
    assert time.starting == BETWEEN_STEPS
    assert time.links == 0
    assert step_time(config, Setup(2, 2), h100, none, 8, 16, LARGE_EXPERTS).starting > 16 * BETWEEN_STEPS
