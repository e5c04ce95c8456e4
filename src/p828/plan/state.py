"""What an engine keeps of every parameter between micro-batches: weights, masters, moments and sums of gradients.

The plain engine (`optim/masters.py`, `optim/adamw.py`), P numbers of matrices in bfloat16:

    2 P weights + 2 P low bits of the masters + 4 P sums of gradients + 4 P moments (8 P in float32)

and 16 bytes for each number of router, norms and sinks, which are their own float32 masters. The sharded engine keeps
the same of a rank's shard, 1 / n of each flat unit (`plan/units.py`), n being a host's ranks where each host has a
replica: at stage 1 all but weights and sums, at stage 2 all but weights, at stage 3 everything. Of embedding and head
every rank sums whole gradients. DeepSpeed on n ranks, in bfloat16, with 4 P of masters and 8 P of moments:

    stage 0: 2 P + 12 P + 4 P of sums      stage 2: 2 P + 12 P / n + 4 P / n
    stage 1: 2 P + 12 P / n + 4 P          stage 3: (2 P + 12 P + 4 P) / n

Stages 1 and 2 flatten each of the optimizer's two groups and fill it up to a multiple of 2 n numbers (`ALIGNMENT`),
stage 3 every parameter by itself to a multiple of n.
"""

from collections.abc import Sequence
from typing import NamedTuple

from p828.config import ModelConfig, OptimizerConfig
from p828.plan.setup import Setup
from p828.plan.tensors import ParameterShape, parameter_shapes
from p828.plan.units import Units, units_of

FLOAT32, BFLOAT16, INT16 = 4, 2, 2  # bytes of a number
MOMENTS = 2  # of AdamW
ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor


class State(NamedTuple):
    """Bytes on each GPU. What is offloaded is in main memory, and not counted."""

    weights: int
    """What the layers compute with."""
    masters: int
    """What float32 masters take beside the weights."""
    gradients: int
    """The sums over a step's micro-batches."""
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


def training_state(model: ModelConfig, optimizer: OptimizerConfig, setup: Setup) -> State:
    """Bytes of each kind on one GPU."""
    parameters = parameter_shapes(model)
    if setup.stage is None:
        return _plain(parameters, setup)
    if setup.is_sharded:
        return _sharded(units_of(parameters, setup.shards), setup)
    return _deepspeed(parameters, optimizer, setup)


def _plain(parameters: Sequence[ParameterShape], setup: Setup) -> State:
    split = sum(one.numbers for one in parameters if one.is_matrix and setup.is_bfloat16)
    whole = sum(one.numbers for one in parameters) - split
    moment = BFLOAT16 if setup.has_bfloat16_moments else FLOAT32
    return State(
        weights=split * BFLOAT16 + whole * FLOAT32,
        masters=split * INT16,
        gradients=(split + whole) * FLOAT32,
        moments=MOMENTS * (split * moment + whole * FLOAT32),
    )


def _sharded(units: Units, setup: Setup) -> State:
    stage, shard = setup.stage or 0, units.total // setup.shards
    summed = units.total if stage == 1 else sum(units.ends) + sum(units.layers) // setup.shards
    low_bits = INT16 if setup.is_bfloat16 else 0
    moment = BFLOAT16 if setup.has_bfloat16_moments else FLOAT32
    return State(
        weights=setup.computed_bytes * (shard if stage == 3 else units.total) + FLOAT32 * units.small,
        masters=low_bits * shard,
        gradients=FLOAT32 * (summed + units.small),
        moments=MOMENTS * (moment * shard + FLOAT32 * units.small),
    )


def _deepspeed(parameters: Sequence[ParameterShape], optimizer: OptimizerConfig, setup: Setup) -> State:
    stage, ranks = setup.stage or 0, setup.ranks
    held = numbers_of_deepspeed(parameters, optimizer, stage, ranks)
    share = held // ranks if stage else held
    has_own_masters = stage == 0 and not setup.is_bfloat16  # a float32 parameter is its own master there
    in_main_memory = setup.offload_optimizer
    sums = share if stage >= 2 else held
    return State(
        weights=0 if setup.offload_param else setup.computed_bytes * (share if stage == 3 else held),
        masters=0 if has_own_masters or in_main_memory else FLOAT32 * share,
        gradients=0 if in_main_memory else FLOAT32 * sums,
        moments=0 if in_main_memory else MOMENTS * FLOAT32 * share,
    )


def numbers_of_deepspeed(
    parameters: Sequence[ParameterShape], optimizer: OptimizerConfig, stage: int, ranks: int
) -> int:
    """Numbers that DeepSpeed holds of all parameters on all ranks together, those that fill up among them."""
    if stage == 0:
        return sum(one.numbers for one in parameters)
    if stage == 3:
        return sum(_filled_up(one.numbers, ranks) for one in parameters)
    groups = [0, 0]
    for one in parameters:
        groups[one.decays(optimizer.decay_embeddings)] += one.numbers
    return sum(_filled_up(numbers, ALIGNMENT * ranks) for numbers in groups)


def _filled_up(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple
