"""How a run had best be trained on its GPUs, in a sentence."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from p828.plan.learning_rate import caveat, learning_rate
from p828.plan.links import link_bytes
from p828.plan.peak import peak
from p828.plan.plan import Plan
from p828.plan.room import largest_micro_batch, recomputing
from p828.plan.setup import Setup, deepspeed_setup, setup_of
from p828.plan.speed import step_time
from p828.plan.state import BFLOAT16, FLOAT32

FILLS_A_GPU = 16_384  # tokens of a micro-batch, beyond which an H100 does not get faster (benchmarks/RESULTS.md)
NEARLY_AS_FAST = 1.03  # times the fastest: then the simpler way is taken
ADVISED_SHARE = 0.9  # of the card's memory: predictions are within a tenth
MOST_OFFLOADED = 256e9  # bytes of main memory for each GPU: more than hosts have
MOST_GPUS = 1024


@dataclass(frozen=True)
class Advice:
    learning_rate: float
    caveat: str
    """What the law of the learning rate does not say about this run; empty within its range."""
    setup: Setup | None = None
    """None where nothing fits."""
    gradient_checkpointing: bool = True
    micro_batch_size: int = 0
    gradient_accumulation: int = 0
    step_seconds: float = 0.0
    memory_bytes: int = 0
    gpus_needed: int = 0
    """GPUs on which ZeRO 3 would fit where nothing does on these; else 0."""

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        found["setup"] = None if self.setup is None else self.setup._asdict()
        return found

    @property
    def flags(self) -> str:
        """For `p828 train`: with the learning rate where the law says something about this run."""
        assert self.setup is not None
        engine, stage = self.setup.engine, self.setup.stage
        found = [] if stage is None else [f"--engine {engine}", f"--{engine}.stage {stage}"]
        if self.setup.offload_optimizer:
            found.append("--deepspeed.offload-optimizer cpu --deepspeed.offload-param cpu")
        if self.gradient_checkpointing:
            found.append("--train.gradient-checkpointing True")
        found += [
            f"--train.micro-batch-size {self.micro_batch_size}",
            f"--train.gradient-accumulation {self.gradient_accumulation}",
        ]
        if not self.caveat:
            found.append(f"--optimizer.learning-rate {self.learning_rate:.2g}")
        return " ".join(found)


def advise(plan: Plan) -> Advice:
    """The fastest way that fits and keeps the step's tokens: engine, recomputation, micro-batch and accumulation."""
    room = ADVISED_SHARE * plan.machine.card.memory_bytes
    ways = list(_ways(plan, _setups(plan), room)) or list(_ways(plan, _offloaded(plan), room))
    active = plan.parameters.active
    rate, doubt = learning_rate(active), caveat(active, plan.tokens_per_step, plan.tokens)
    if not ways:
        return Advice(rate, doubt, gpus_needed=_gpus_needed(plan, room))
    fastest = min(way.step_seconds for way in ways)
    way = next(way for way in ways if way.step_seconds <= NEARLY_AS_FAST * fastest)
    return Advice(
        rate,
        doubt,
        way.setup,
        way.recomputes,
        way.micro_batch_size,
        _rows(plan) // way.micro_batch_size,
        way.step_seconds,
        way.memory_bytes,
    )


class _Way(NamedTuple):
    setup: Setup
    recomputes: bool
    micro_batch_size: int
    step_seconds: float
    memory_bytes: int


def _ways(plan: Plan, setups: Sequence[Setup], room: float) -> Iterator[_Way]:
    """Each engine that fits, and each with recomputation; a configuration that recomputes goes on doing so."""
    machine, rows = plan.machine, _rows(plan)
    for setup in setups:
        for config in dict.fromkeys((plan.config, recomputing(plan.config))):
            recomputes = config.train.gradient_checkpointing
            largest = largest_micro_batch(config, setup, room)
            if not largest:
                continue
            size = _micro_batch_size(plan, setup.reduces_by_hooks or recomputes, rows, largest)
            links = link_bytes(setup, plan.parameters.total, rows // size)
            time = step_time(config, setup, machine.card, links, size, rows // size, machine.rate)
            yield _Way(setup, recomputes, size, time.seconds, peak(config, setup, size).total)


def _rows(plan: Plan) -> int:
    """Sequences of a step on each GPU."""
    return plan.config.train.micro_batch_size * plan.config.train.gradient_accumulation


def _setups(plan: Plan) -> list[Setup]:
    """The simplest first: plain on one GPU, else each stage; with nothing offloaded."""
    is_one = plan.machine.gpus == 1
    setups = [engine.setup for engine in plan.engines if (engine.setup.stage is None) == is_one]
    return [setup._replace(offload_optimizer=False, offload_param=False) for setup in setups]


def _offloaded(plan: Plan) -> list[Setup]:
    """Stage 3 with all of the state in main memory, where that may have room for it."""
    if offloaded_bytes(plan) > MOST_OFFLOADED * plan.machine.gpus:
        return []
    setup = deepspeed_setup(plan.config, 3, plan.machine.gpus, plan.machine.hosts)
    return [setup._replace(offload_optimizer=True, offload_param=True)]


def offloaded_bytes(plan: Plan) -> int:
    """Of main memory, on all hosts together, if weights, masters, moments and sums of gradients are there."""
    return (BFLOAT16 + 4 * FLOAT32) * plan.parameters.total


def _micro_batch_size(plan: Plan, is_host_bound: bool, rows: int, largest: int) -> int:
    """Of the divisors of the step's rows that fit, the least that fills the GPU.

    The largest where the host starts every kernel, as without CUDA graphs.
    """
    divisors = [size for size in range(1, rows + 1) if rows % size == 0 and size <= largest]
    if is_host_bound:
        return divisors[-1]
    length = plan.config.data.sequence_length
    return next((size for size in divisors if size * length >= FILLS_A_GPU), divisors[-1])


def _gpus_needed(plan: Plan, room: float) -> int:
    gpus = 2 * plan.machine.gpus
    while gpus <= MOST_GPUS:
        setup = setup_of(plan.config, 3, gpus, plan.machine.hosts * gpus // plan.machine.gpus)
        if largest_micro_batch(recomputing(plan.config), setup, room):
            return gpus
        gpus *= 2
    return 0
