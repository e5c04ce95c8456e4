"""One of two processes that compute an export's logits together: DIRECTORY, TOKENS in JSON, the file for the logits.

It writes the logits by tensor parallelism, by expert parallelism too, and the sizes of what the process holds.
"""

import json
import sys
from pathlib import Path

import torch
from own_export import load
from torch import distributed, nn
from transformers.distributed import DistributedConfig


def held(parameter: nn.Parameter) -> list[int]:
    return list(getattr(parameter, "_local_tensor", parameter).shape)


def main(directory: Path, tokens: list[list[int]], out: Path) -> None:
    distributed.init_process_group("gloo")
    results = []
    for experts in (1, 2):
        config = DistributedConfig(tp_size=2, ep_size=experts, tp_plan="auto")
        model = load(directory, "sdpa", distributed_config=config)
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits
        layer = model.model.layers[0]
        sizes = [held(layer.self_attn.q_proj.weight), held(layer.mlp.experts.gate_up_proj)]
        results.append({"logits": logits.tolist(), "sizes": sizes})
    if distributed.get_rank() == 0:
        out.write_text(json.dumps(results), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
