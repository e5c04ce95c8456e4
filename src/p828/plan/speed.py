"""How long a step takes: matrix products at a rate that was measured or is assumed, and what else may be slower.

Rates are shares of a card's datasheet that p828 reached on H100s (benchmarks/RESULTS.md), with FLOPs counted as
`model.costs.flops_per_token` does, attention over whole rows. Other cards and models are assumed to reach as much.
"""

from typing import NamedTuple

from p828.config import Config
from p828.model.costs import count_parameters, flops_by_part, flops_per_token
from p828.plan.links import LinkBytes
from p828.plan.setup import Setup
from p828.system.cards import Card

# Of the datasheet's FLOP/s: `800m` 230,349 and `fine-grained` 255,181 tokens a second, plain engine, one H100.
LARGE_EXPERTS, SMALL_EXPERTS = 0.466, 0.371
SMALL_WIDTH = 640  # of an expert, below which its products fill a GPU less (`60m`, 768 wide, reached 0.43)
# Seconds in which the host starts a layer's kernels, forward and backward, where they are not one CUDA graph: `800m`,
# 12 layers, 112 ms a micro-batch without DeepSpeed, 150 at stage 2 and 235 at stage 3 on two GPUs.
HOST_ALONE, HOST_STAGE_2, HOST_STAGE_3 = 0.0093, 0.0125, 0.0196
BETWEEN_STEPS = 2e-3  # seconds of the host: steps of four micro-batches of `60m` took 32.8 ms in training, of which 31
KERNEL = 4e-6  # seconds of a kernel that has nearly nothing to do, about
KERNELS = 50  # of a layer (engine/cuda_graph.py), and about as many of all that is around the layers
UPDATE_BYTES = 24  # of a parameter, read and written by the plain engine's norm and AdamW
MEMORY_SHARE = 0.8  # of the memory's rate, about
LINK_SHARE = 0.42  # of the link's rate: 2.4 GB in 12.9 ms between two H100s; 0.34 to 0.51 between two and four H200s
# Of a second in which the sharded engine's gathering and reducing run beside its computing, what the step is longer by:
# they take memory from it, and multiprocessors where kernels copy, as between hosts and over PCIe. By kernels `800m` on
# two and four H200s had 0.28 to 0.59. With copy engines, over NVLink, 0.1 and WAITING are within 1% of its steps there
# at all stages, though kernels still reduce stage 1's sums.
SLOWED, SLOWED_BY_KERNELS = 0.1, 0.4
WAITING = 0.025  # of a step's computing, for the slowest of several GPUs, and for what lies between its graphs
BACKWARD = 2 / 3  # of a micro-batch's time


class StepTime(NamedTuple):
    """Seconds of a step."""

    computing: float
    """Of all micro-batches on the GPU."""
    starting: float
    """What the host needs longer to start kernels than the GPU to run them, and between two steps."""
    updating: float
    """Of the weights, as far as memory bounds it."""
    links: float
    """What a step is longer by for reducing and gathering, and for waiting for other GPUs."""

    @property
    def seconds(self) -> float:
        return sum(self)


def assumed_rate(config: Config) -> float:
    """Share of a card's datasheet that the matrix products are assumed to reach."""
    return SMALL_EXPERTS if config.model.moe_intermediate_size < SMALL_WIDTH else LARGE_EXPERTS


def step_time(
    config: Config, setup: Setup, card: Card, link: LinkBytes, micro_batch_size: int, accumulation: int, rate: float
) -> StepTime:
    """Of `accumulation` micro-batches on each GPU. `rate` is the share of the card's FLOP/s."""
    flops = computed_flops(config) * micro_batch_size * config.data.sequence_length
    least = (config.model.num_hidden_layers + 1) * KERNELS * KERNEL
    computing = max(flops / (card.peak_flops * rate), least)
    host = config.model.num_hidden_layers * _host_seconds(config, setup)
    starting = max(host - computing, 0.0)
    links = _links_seconds(setup, link, card, max(computing, host), accumulation)
    updated = count_parameters(config.model).total / (1 if setup.stage in (None, 0) else setup.shards)
    updating = UPDATE_BYTES * updated / (card.memory_rate * MEMORY_SHARE)
    return StepTime(accumulation * computing, accumulation * starting + BETWEEN_STEPS, updating, links)


def _links_seconds(setup: Setup, link: LinkBytes, card: Card, micro_batch_seconds: float, accumulation: int) -> float:
    """What the links add to a step."""
    per_byte = 1 / (card.link_rate * LINK_SHARE)
    if setup.is_sharded and setup.ranks > 1:
        # Stage 1 reduces beside the last micro-batch, and gathers beside the update and the next one.
        covering = micro_batch_seconds * (accumulation if setup.stage in (2, 3) else 1)
        seconds, slowed = link.total * per_byte, SLOWED if card.has_nvlink and setup.hosts == 1 else SLOWED_BY_KERNELS
        waiting = WAITING * accumulation * micro_batch_seconds
        return max(seconds - covering, 0.0) + slowed * min(seconds, covering) + waiting
    if setup.reduces_by_hooks:  # after each micro-batch, as stage 3 gathers, beside the computing
        return max(link.total * per_byte - accumulation * micro_batch_seconds, 0.0)
    # The last micro-batch's backward pass covers what it can of the reduction, and nothing the gathering.
    return max(link.reduced * per_byte - BACKWARD * micro_batch_seconds, 0.0) + link.gathered * per_byte


def computed_flops(config: Config) -> float:
    """FLOPs of a token that are computed; with recomputation the layers' forward pass is made twice."""
    length = config.data.sequence_length
    flops = flops_per_token(config.model, length)
    if not config.train.gradient_checkpointing:
        return flops
    return flops + (flops - flops_by_part(config.model, 1, 0).head) / 3


def _host_seconds(config: Config, setup: Setup) -> float:
    if setup.reduces_by_hooks:
        return HOST_STAGE_3 if setup.stage == 3 and setup.ranks > 1 else HOST_STAGE_2
    return HOST_ALONE if config.train.gradient_checkpointing or config.train.compile == "off" else 0.0
