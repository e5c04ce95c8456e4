"""One of two ranks: what DeepSpeed keeps of a model's parameters at each ZeRO stage, in bytes, as JSON on a line."""

import dataclasses
import json
import sys
from typing import Any

from torch import Tensor

from p828.config import Config, load
from p828.distributed.group import ProcessGroup, joined
from p828.engine.deepspeed.engine import DeepSpeedEngine, check_deepspeed
from p828.engine.deepspeed.partitions import flat_groups


def main() -> None:
    config = load(sys.argv[1])
    with joined(config) as ranks:
        found = {stage: kept(config, stage, ranks) for stage in range(4)}
        if ranks.is_first:
            print(json.dumps(found))


def kept(config: Config, stage: int, ranks: ProcessGroup) -> dict[str, int]:
    config = dataclasses.replace(config, deepspeed=dataclasses.replace(config.deepspeed, stage=stage))
    engine = DeepSpeedEngine(config, ranks, check_deepspeed(config, ranks))
    optimizer: Any = engine._optimizer
    flats = flat_groups(optimizer, stage)
    moments = [engine._state(flat)[key] for flat in flats for key in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": size(weights(engine, stage)),
        "masters": size(flats),
        "gradients": size(sums(engine, stage)),
        "moments": size(moments),
    }


def weights(engine: DeepSpeedEngine, stage: int) -> list[Tensor]:
    if stage == 3:
        return list(engine._optimizer.fp16_partitioned_groups_flat)
    return list(engine._optimizer.bit16_groups_flat) if stage else list(engine.model.parameters())


def sums(engine: DeepSpeedEngine, stage: int) -> list[Tensor]:
    """Where a step's gradients are summed; at stage 2 DeepSpeed makes that for each step, of this size."""
    if engine._reducer is not None:
        return engine._reducer._flats
    if stage == 3:
        return [engine._optimizer.grad_partitions_flat_buffer]
    return list(engine._optimizer.single_partition_of_fp32_groups)


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    main()
