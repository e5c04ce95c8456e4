"""The links between GPUs, from GPUs to network cards, and whether this process may run on the processors near a GPU."""

import os

from p828.config import Config, with_vocabulary
from p828.distributed.links import (
    SLOW,
    advice,
    bus_bandwidth,
    expected_bandwidth,
    named_pairs,
    nccl_settings,
    slowest_needed,
)
from p828.distributed.topology import KINDS, Topology
from p828.doctor.check import Check
from p828.engine.deepspeed.settings import deepspeed_settings
from p828.model.costs import count_parameters

NOMINAL_BYTES = 10**9  # of a gradient whose size is not known
FLOAT32, BFLOAT16 = 4, 2  # bytes of a number


def check_links(topology: Topology, gpus: int, seconds_per_byte: float | None, config: Config | None) -> list[Check]:
    """The links among `gpus` GPUs, and what else nvidia-smi says of where they sit.

    `seconds_per_byte` is of a measured all-reduce; without it, what is usual for the links counts.
    """
    checks = [_between_gpus(topology, gpus, seconds_per_byte, config)] if gpus > 1 else []
    return [*checks, *_cards(topology), *_processors(topology)]


def gradient_of(config: Config | None, gpus: int) -> tuple[int, int]:
    """Bytes of the gradient that `gpus` GPUs reduce with the engine of `config`, and how often they do in a step.

    p828 sums a step's gradient in float32 up to ZeRO stage 1. From stage 2 on, and where DeepSpeed updates in main
    memory, each micro-batch's gradient is reduced in the dtype of the layers, also where each host has a replica.
    Raises ConfigError for a DeepSpeed file that is not accepted.
    """
    if config is None:
        return NOMINAL_BYTES, 1
    dtype = "float32" if config.train.dtype == "float32" else "bfloat16"  # as "auto" is on a GPU
    is_once = config.engine == "plain" or config.sharded.stage < 2
    if config.engine == "deepspeed":
        settings = deepspeed_settings(config, dtype, gpus)
        is_once = settings.stage < 2 and not settings.offload_optimizer
    numbers = count_parameters(with_vocabulary(config).model).total
    size = FLOAT32 if is_once or dtype == "float32" else BFLOAT16
    return numbers * size, 1 if is_once else config.train.gradient_accumulation


def _between_gpus(topology: Topology, gpus: int, seconds_per_byte: float | None, config: Config | None) -> Check:
    name, kind = "links", slowest_needed(topology.links)
    if not kind and seconds_per_byte is None:
        return Check(name, "warning", "not known: nvidia-smi topo -m says nothing of these GPUs", nccl_settings(""))
    size, reductions = gradient_of(config, gpus)
    is_assumed = seconds_per_byte is None
    if seconds_per_byte is None:
        # 2 (n - 1) / n of the bytes cross the slowest link, see `bus_bandwidth`.
        seconds_per_byte = 1 / (expected_bandwidth(kind) * 1e9) * 2 * (gpus - 1) / gpus
    lines = advice(topology.links, size * seconds_per_byte, size, gpus, reductions)
    if lines:
        what, cost, fewer, one_gpu = lines
        told = f"{what.removeprefix('slow link: ')}; {cost}{' (as usual for such links)' if is_assumed else ''}"
        return Check(name, "warning", told, f"{fewer}; {one_gpu}")
    rate = bus_bandwidth(size, size * seconds_per_byte, gpus)
    meaning = f"{kind[2:]} NVLinks" if kind.startswith("NV") else KINDS.get(kind, "of unknown kind")
    far = [other for other in SLOW if other in topology.links.values()]
    around = "".join(f"; {named_pairs(topology.links, other)} by {other}, which NCCL goes round" for other in far)
    usual = " as usual" if is_assumed else ""
    return Check(name, "ok", f"{kind or 'unknown'} ({meaning}): {rate:.3g} GB/s{usual}{around}")


def _cards(topology: Topology) -> list[Check]:
    """The network card nearest to each GPU, which a run on several hosts uses; none where there are no cards."""
    nearest = topology.nearest_cards()
    if not nearest:
        return []
    shown = ", ".join(f"GPU{gpu}: {card} ({kind})" for gpu, (card, kind) in sorted(nearest.items()))
    if not any(kind in SLOW for _, kind in nearest.values()):
        return [Check("network cards", "ok", shown)]
    return [
        Check(
            "network cards", "ok", f"{shown}; far from a GPU, which costs a run on several hosts alone",
            "on several hosts: NCCL_NET_GDR_LEVEL=SYS has far cards read the GPU's memory directly",
        )
    ]  # fmt: skip


def _processors(topology: Topology) -> list[Check]:
    """Whether this process may run on processors near each GPU; none where nvidia-smi does not tell which these are."""
    if not topology.cpus:
        return []
    own = os.sched_getaffinity(0)
    far = sorted(gpu for gpu, cpus in topology.cpus.items() if not cpus & own)
    if not far:
        nodes = ", ".join(f"GPU{gpu}: node {node}" for gpu, node in sorted(topology.numa.items()))
        return [Check("processors", "ok", f"near every GPU{f' ({nodes})' if nodes else ''}")]
    names = ", ".join(f"GPU{gpu}" for gpu in far)
    return [
        Check(
            "processors", "warning",
            f"this process may run on none that is near {names}: starting kernels and copying batches take longer",
            f"start it with numactl --cpunodebind={topology.numa.get(far[0], 'NODE')}, or with other limits of the "
            "container",
        )
    ]  # fmt: skip
