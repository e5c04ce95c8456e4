import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oracles import assert_near
from p828.config import Config
from p828.data.batch import Batch
from p828.engine.microbatch import GradientAccumulator
from p828.model.init import initialise
from p828.model.precision import matrices
from p828.model.router import Routing
from p828.model.transformer import Transformer
from runs import run_config

F32, BF16 = torch.float32, torch.bfloat16


def build(config: Config, dtype: torch.dtype, segments: int = 1) -> GradientAccumulator:
    model = Transformer(config.model)
    initialise(model, 0)
    if dtype == BF16:
        for _, parameter in matrices(model):
            parameter.data = parameter.data.to(dtype)
    gradients = GradientAccumulator(model, config.balance, dtype, segments=segments)
    gradients.scale.fill_(1 / 192)
    return gradients


def batch_of(config: Config, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocab_size, (2, 33), generator=generator)
    positions = torch.arange(32).expand(2, -1).contiguous()
    return Batch(tokens[:, :-1], tokens[:, 1:].clone(), positions, torch.zeros_like(positions, dtype=torch.int32), 64)


def of_one(gradients: GradientAccumulator, batch: Batch) -> dict[str, Tensor]:
    gradients.begin_step()
    gradients.add(batch)
    return {name: gradients.sums[p].clone() for name, p in gradients.model.named_parameters()}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tied", [False, True])
def test_they_are_summed_in_float32_over_a_steps_micro_batches(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """In whatever dtype one micro-batch's are, and without anything of the step before."""
    config = run_config(tmp_path, model={"tie_word_embeddings": tied})
    gradients = build(config, dtype)
    for seeds in (range(3), range(3, 6)):
        batches = [batch_of(config, seed) for seed in seeds]
        expected: dict[str, Tensor] = {}
        for batch in batches:
            for name, gradient in of_one(gradients, batch).items():
                expected[name] = expected.get(name, 0.0) + gradient
        gradients.begin_step()
        for batch in batches:
            gradients.add(batch)
        for name, parameter in gradients.model.named_parameters():
            assert gradients.sums[parameter].dtype == F32
            assert parameter.grad is None
            # Embedding and head are summed token by token and so in another order: units of 2^-24 of large terms.
            torch.testing.assert_close(gradients.sums[parameter], expected[name], rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_a_backward_pass_in_segments_changes_nothing(tmp_path: Path, tied: bool) -> None:
    """Each parameter's sum is complete when it is said to be; and all of them are said, once."""
    config = run_config(tmp_path, model={"tie_word_embeddings": tied, "num_hidden_layers": 5})
    whole, parts = build(config, F32), build(config, F32, segments=3)
    when_added: dict[str, Tensor] = {}
    names = {parameter: name for name, parameter in parts.model.named_parameters()}

    def look(parameters: list[Tensor]) -> None:
        for parameter in parameters:
            assert names[parameter] not in when_added
            when_added[names[parameter]] = parts.sums[parameter].clone()

    for seed in range(2):
        when_added.clear()
        whole.add(batch_of(config, seed))
        parts.add(batch_of(config, seed), look)
    expected = {name: whole.sums[parameter] for name, parameter in whole.model.named_parameters()}
    assert when_added.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(when_added[name], value), name
    for name, total in whole.totals.items():
        assert torch.equal(total, parts.totals[name]), name


def test_auxiliary_losses_reach_all_layers_whatever_the_segments(tmp_path: Path) -> None:
    config = run_config(tmp_path, balance={"sequence_loss_weight": 0.1, "z_loss_weight": 0.1})
    whole, parts = build(config, F32), build(config, F32, segments=2)
    for gradients in (whole, parts):
        gradients.add(batch_of(config, 0))
    for ours, theirs in zip(parts.sums.values(), whole.sums.values(), strict=True):
        assert torch.equal(ours, theirs)


def auxiliary_in_float64(model: Transformer, batch: Batch, weights: tuple[float, float]) -> Tensor:
    """The two losses' weighted sum over layers and over the tokens that have a target, token by token in float64."""
    routings: list[Routing] = []
    for layer in model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, routing: routings.append(routing))
    model(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=torch.float64)
    total, rows = 0.0 * sum(layer.mlp.gate.weight.sum() for layer in model.layers), torch.arange(64).view(2, 32)
    for routing, row in itertools.product(routings, rows):
        tokens = [t for t in row.tolist() if batch.targets_BS.flatten()[t] >= 0]
        experts, per_token = routing.scores_TE.shape[1], routing.experts_TK.shape[1]
        for e in range(experts if tokens else 0):
            chose = sum(e in routing.experts_TK[t].tolist() for t in tokens)
            share = sum(routing.scores_TE[t, e] / routing.scores_TE[t].sum() for t in tokens)
            total = total + weights[0] * experts / (per_token * len(tokens)) * chose * share
        total = total + weights[1] * sum(routing.logits_TE[t].exp().sum().log() ** 2 for t in tokens)
    return total


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("targets", [(1, 0), (3, 30), (32, 32), (0, 0)])
def test_auxiliary_losses_count_the_tokens_that_have_a_target(
    tmp_path: Path, targets: tuple[int, int], recomputes: bool
) -> None:
    """Over two micro-batches, the second with as many targets in its other row, and divided by all of them."""
    weights = (0.3, 0.1)
    balance = dict(zip(("sequence_loss_weight", "z_loss_weight"), weights, strict=True))
    configs = [run_config(tmp_path, balance=values) for values in (balance, {})]
    on, off = (build(config, F32) for config in configs)
    batches = [batch_of(configs[0], seed) for seed in range(2)]
    for batch, counts in zip(batches, (targets, targets[::-1]), strict=True):
        for row, count in enumerate(counts):
            batch.targets_BS[row, torch.randperm(32)[count:]] = -100
    for gradients in (on, off):
        for layer in gradients.model.layers:
            layer.gradient_checkpointing = recomputes
            layer.auxiliary_losses = gradients is on
        gradients.scale.fill_(1 / max(2 * sum(targets), 1))
        for batch in batches:
            gradients.add(batch)
    twin = Transformer(on.model.config)
    initialise(twin, 0)
    twin.double()
    loss = sum((auxiliary_in_float64(twin, batch, weights) for batch in batches), torch.zeros((), dtype=torch.float64))
    (loss * on.scale).backward()
    for name, parameter in twin.named_parameters():
        if name.endswith("gate.weight"):
            ours = on.sums[dict(on.model.named_parameters())[name]] - off.sums[dict(off.model.named_parameters())[name]]
            assert_near(ours, parameter.grad, 1e-5)  # float32 gradients of some units, and their difference


def test_recomputed_layers_give_the_same_sums(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    kept, recomputed = build(config, F32), build(config, F32, segments=2)
    for layer in recomputed.model.layers:
        layer.gradient_checkpointing = True
    for gradients in (kept, recomputed):
        gradients.add(batch_of(config, 0))
    for ours, theirs in zip(recomputed.sums.values(), kept.sums.values(), strict=True):
        assert torch.equal(ours, theirs)
