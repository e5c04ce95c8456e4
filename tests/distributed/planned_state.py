"""One of two ranks: what an engine keeps of a model's parameters at each ZeRO stage, in bytes, as JSON on a line."""

import dataclasses
import json
import sys
from typing import Any

from torch import Tensor

from p828.config import Config, load
from p828.distributed.group import ProcessGroup, joined
from p828.engine.deepspeed.engine import DeepSpeedEngine, check_deepspeed
from p828.engine.deepspeed.partitions import flat_groups
from p828.engine.sharded.engine import ShardedEngine


def main() -> None:
    config = load(sys.argv[1])
    with joined(config) as ranks:
        found = {f"deepspeed {stage}": kept(config, stage, ranks) for stage in range(4)}
        found |= {f"sharded {stage}": kept_sharded(config, stage, ranks) for stage in (1, 2, 3)}
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


def kept_sharded(config: Config, stage: int, ranks: ProcessGroup) -> dict[str, int]:
    config = dataclasses.replace(config, engine="sharded", sharded=dataclasses.replace(config.sharded, stage=stage))
    engine = ShardedEngine(config, ranks)
    weights, gradients, small = engine.weights, engine.gradients, [*engine._small.values()]
    sums = [*(gradients._flats if stage == 1 else ()), gradients._small]
    if stage > 1:  # of embedding and head every rank sums the whole
        kinds = zip(gradients._slots, gradients._flats, gradients.shards, strict=True)
        sums += [flat if slot is None else shard for slot, flat, shard in kinds]
    state = engine.optimizer.state_dict()
    return {
        "weights": size([*(weights.shards if stage == 3 else weights.flats), *small]),
        "masters": size([low for low in engine.state.low_bits if low is not None]),
        "gradients": size(sums),
        "moments": size([tensor for name, tensor in state.items() if not name.startswith("step/")]),
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
