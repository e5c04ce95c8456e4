"""What `test_sharded_ranks.py` starts on several ranks: engines at each stage beside the plain one on rank 0.

usage: torchrun … sharded_worker.py DIRECTORY ACCUMULATION CASE…

A case is `STAGE[-host][-tied][-auxiliary][-recomputed][-bfloat16][-wide]`. Rank 0 writes what it found to
DIRECTORY/CASE.json.
"""

import dataclasses
import json
import sys
import weakref
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from p828.bench.collectives import counted
from p828.config import Config, ShardedConfig, from_dict
from p828.data.batch import Batch
from p828.distributed.group import ProcessGroup, joined
from p828.engine.interface import Engine
from p828.engine.plain import PlainEngine
from p828.engine.sharded.engine import ShardedEngine
from p828.errors import RunFailed
from p828.inference.decode.decoder import Decoder
from p828.inference.evaluate import evaluate, evaluation_mode, uncompiled
from p828.inference.sampling_config import SamplingConfig
from p828.kernels.adamw import join_float32
from p828.model.transformer import Transformer
from p828.runs import checkpoint
from p828.runs.tensors import tensors_of
from p828.train import checkpoint_writer

LINK = "p828"
STEPS, ROWS, LENGTH, VOCABULARY, RATE = 20, 2, 16, 61, 0.002
Found = dict[str, Any]


def main() -> None:
    directory, accumulation, *cases = sys.argv[1:]
    with joined(config_of("1", int(accumulation))) as ranks:
        for case in cases:
            config = config_of(case, int(accumulation))
            found = keep(config, ranks, Path(directory, case))
            if "bfloat16" not in case:  # whose roundings lead losses apart
                found |= train(config, ranks)
            if ranks.is_first:
                Path(directory, f"{case}.json").write_text(json.dumps(found))


def config_of(case: str, accumulation: int) -> Config:
    stage, *options = case.split("-")
    weight = 0.01 if "auxiliary" in options else 0.0
    inner = 512 if "wide" in options else 24
    values: dict[str, Any] = {
        "name": "sharded",
        "engine": "sharded",
        "model": {
            "vocab_size": VOCABULARY, "hidden_size": 16, "moe_intermediate_size": inner, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": LENGTH,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": "tied" in options,
            "use_qk_norm": True,
        },
        # By a larger eps than usual, numbers whose gradient is next to nothing do not make steps of the rounding error.
        "optimizer": {"moment_dtype": "bfloat16" if "bfloat16" in options else "auto", "eps": 1e-6},
        "balance": {"sequence_loss_weight": weight, "z_loss_weight": weight},
        "train": {
            "device": "cpu", "dtype": "bfloat16" if "bfloat16" in options else "float32",
            "gradient_accumulation": accumulation, "gradient_checkpointing": "recomputed" in options,
        },
        "sharded": {"stage": int(stage), "shard_within": "host" if "host" in options else "all"},
    }  # fmt: skip
    return from_dict(values, "sharded")


def train(config: Config, ranks: ProcessGroup) -> Found:
    """Losses, norms and loads of both engines on the same micro-batches; then an evaluation, samples and weights."""
    engine = ShardedEngine(config, ranks)
    plain = PlainEngine(dataclasses.replace(config, engine="plain")) if ranks.is_first else None
    accumulation = config.train.gradient_accumulation
    ours, theirs = [], []
    for step in range(STEPS):
        batches = [batch_of(step * 100 + number) for number in range(accumulation * ranks.size)]
        ours.append(step_of(engine, batches[ranks.rank :: ranks.size], batches))
        if plain is not None:
            theirs.append(step_of(plain, batches, batches))
    with PeakBytes() as evaluation_peak, engine.model_for_evaluation() as model:
        ours.append(evaluate(model, [batch_of(1), batch_of(2)], engine.dtype).loss)
    with PeakBytes() as peak, engine.model_for_any_passes() as model:
        samples = continued(model, engine.dtype) if ranks.is_first else []
    found = {"ours": ours, "theirs": theirs, "samples": samples, "any_passes": any_passes(engine, ranks)}
    found["peak_bytes"] = ranks.all_gather([peak.most])
    found["evaluation_bytes"] = evaluation_peak.most
    weights = gathered(engine)
    if plain is not None:
        with PeakBytes() as evaluation_peak:
            theirs.append(evaluate(plain.model, [batch_of(1), batch_of(2)], plain.dtype).loss)
        found["their_evaluation_bytes"] = evaluation_peak.most
        found["their_samples"] = continued(plain.model, plain.dtype)
        found["single_losses"] = [evaluate(plain.model, [batch_of(n)], plain.dtype).loss for n in range(ranks.size)]
        parameters = plain.model.named_parameters()
        distances = [float((weights[name] - p.detach().float()).abs().max()) for name, p in parameters]
        found["weights"] = max(distances)
        found["bias_is_equal"] = all(
            torch.equal(own.mlp.gate.e_score_correction_bias, other.mlp.gate.e_score_correction_bias)
            for own, other in zip(engine.model.layers, plain.model.layers, strict=True)
        )
    return found


def continued(model: Transformer, dtype: torch.dtype) -> list[list[int]]:
    """Tokens that follow on prompts, drawn."""
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=8)
    prompts = [[], [3, 1, 4, 1, 5], [9, 2], list(range(LENGTH - 2))]
    with evaluation_mode(model), uncompiled(model):
        decoder = Decoder(model, VOCABULARY, 0, dtype, slots=len(prompts), prefill_tokens=4)
        sequences = [decoder.admit(prompt, sampling, seed) for seed, prompt in enumerate(prompts)]
        while decoder.running:
            decoder.step()
    return [list(sequence.ids) for sequence in sequences]


def any_passes(engine: ShardedEngine, ranks: ProcessGroup) -> list[list[float]]:
    """The losses that each rank finds on batches, as many as its number, before it fails between two passes."""
    losses = []
    with suppress(RunFailed), engine.model_for_any_passes() as model:
        for number in range(ranks.rank):
            losses.append(evaluate(model, [batch_of(number)], engine.dtype).loss)
        raise RunFailed("made up")
    return ranks.all_gather_object(losses)


def gathered(engine: ShardedEngine) -> dict[str, Tensor]:
    """All weights, float32. All ranks must call it."""
    found = {name: parameter.detach().float() for name, parameter in engine._small.items()}
    for number, unit in enumerate(engine.units):
        engine.weights.wait(number)
        found |= {name: view.float().clone() for name, view in unit.views(engine.weights.flats[number]).items()}
    return found


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made in the block that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._bytes = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), before)
        return result

    def _note(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        if storage._cdata not in self._storages | before:
            self._storages.add(storage._cdata)
            self._bytes += storage.nbytes()
            self.most = max(self.most, self._bytes)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, size: int) -> None:
        self._storages.discard(storage)
        self._bytes -= size


def keep(config: Config, ranks: ProcessGroup, directory: Path) -> Found:
    """A step that is not finite; and a checkpoint, read at every stage and by the plain engine."""
    engine = ShardedEngine(config, ranks)
    batches = [batch_of(number) for number in range(config.train.gradient_accumulation * ranks.size)]
    own = batches[ranks.rank :: ranks.size]
    for _ in range(2):
        step_of(engine, own, batches)
    before = snapshot(engine)
    if ranks.rank == ranks.size - 1:
        next(iter(engine.gradients.small.values())).fill_(torch.inf)
    for batch in own:
        engine.forward_backward(batch, 1)
    applied = engine.step(RATE).applied
    found: Found = {"applied": applied, "unchanged": before == snapshot(engine)}
    path = checkpoint_writer.save(directory, 2, engine.state_dict(), {}, ranks)
    sent = sent_over_link()
    dist.barrier()  # nobody counts what another rank has sent of the step
    with counted() as passed:
        after = step_of(engine, own, batches)
    dist.barrier()
    found["over_link"] = sent_over_link() - sent
    found |= {"after": after, "passed": dict(passed)} | sizes_of(engine)
    found["resumed"] = []
    for within, stage in product(dict.fromkeys(("all", config.sharded.shard_within)), (1, 2, 3)):
        other = dataclasses.replace(config, sharded=ShardedConfig(stage=stage, shard_within=within))
        resumed = ShardedEngine(other, ranks)
        with checkpoint.opened(path) as saved:
            resumed.load_state_dict(saved.tensors)
        found["resumed"].append(step_of(resumed, own, batches))
        if other == config:
            found["same_bits"] = found["resumed"][-1] == after and snapshot(resumed) == snapshot(engine)
    if ranks.is_first:
        plain = PlainEngine(dataclasses.replace(config, engine="plain"))
        with checkpoint.opened(path) as saved:
            plain.load_state_dict(saved.tensors)
        found["resumed"].append(step_of(plain, batches, batches))
    return found


def sizes_of(engine: ShardedEngine) -> Found:
    """Bytes of each unit, of the gradients that are in none, and of what a step sums over ranks beside them."""
    totals = engine._pass.totals.values()
    return {
        "shards": engine.mesh.shards,
        "unit_bytes": [unit.length * torch.float32.itemsize for unit in engine.units],
        "small_bytes": sum(tensor.nbytes for tensor in engine.gradients.small.values()),
        "totals_bytes": torch.float64.itemsize * (len(engine._parts) + sum(tensor.numel() for tensor in totals)),
    }


def sent_over_link() -> int:
    """Bytes that this host has sent over the link of `benchmarks/simulated_hosts.py`; 0 without one."""
    interfaces = psutil.net_io_counters(pernic=True)
    return int(interfaces[LINK].bytes_sent) if LINK in interfaces else 0


def batch_of(seed: int) -> Batch:
    """Random tokens in documents; the last ones of a row are padding, more or fewer of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    documents = torch.arange(LENGTH, dtype=torch.int32).expand(ROWS, -1).contiguous() // 5
    positions = torch.arange(LENGTH).expand(ROWS, -1).contiguous() % 5
    targets, padding = tokens[:, 1:].clone(), 1 + seed % 4
    targets[:, -padding:] = -100
    documents[:, -padding:] = -1
    return Batch(tokens[:, :-1].contiguous(), targets, positions, documents, ROWS * (LENGTH - padding))


def step_of(engine: Engine, own: list[Batch], all_of_them: list[Batch]) -> tuple[float, float, list[list[int]]]:
    num_targets = sum(batch.num_targets for batch in all_of_them)
    for batch in own:
        engine.forward_backward(batch, num_targets)
    result = engine.step(RATE)
    return result.loss, result.grad_norm, result.loads


def snapshot(engine: ShardedEngine) -> dict[str, list[float]]:
    """This rank's weights, bias and optimizer state."""
    state = engine.state_dict()
    values = {f"{part}/{name}": value for part in ("model", "optimizer") for name, value in state[part].items()}
    return {name: _joined(tensors_of(value)).flatten().tolist() for name, value in values.items()}


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    return join_float32(*tensors) if len(tensors) > 1 else tensors[0]


if __name__ == "__main__":
    main()
