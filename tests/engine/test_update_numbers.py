"""What an update did, against norms of whole parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_plain import batch_of
from torch import Tensor

from p828.config import load, preset_names
from p828.engine.plain import PlainEngine
from p828.kernels.adamw import join_float32
from p828.model.transformer import Transformer
from p828.optim import update_numbers
from p828.optim.balance import bias_numbers
from p828.optim.parts import PARTS, ByPart, part_of
from runs import run_config

# A bfloat16 number has 8 significant bits, so the layers' weights change where the masters do by about 2^-9 of them.


def masters_of(engine: PlainEngine) -> dict[str, Tensor]:
    """float32, or float64 for sums, of every parameter."""
    joined = {name: join_float32(*master) for name, master in engine.masters.state_dict().items()}
    return {name: joined.get(name, p.detach()).double() for name, p in engine.model.named_parameters()}


def norms(tensors: dict[str, Tensor], part: str) -> float:
    return torch.cat([tensor.flatten() for name, tensor in tensors.items() if part_of(name) == part]).norm().item()


@pytest.mark.parametrize("sampled", [10_000, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_by_part_are_those_of_whole_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, sampled: int
) -> None:
    monkeypatch.setattr(update_numbers, "SAMPLED", sampled)
    engine = PlainEngine(run_config(tmp_path, train={"dtype": dtype}))
    config, rate = engine.config, 3e-4
    for _ in range(2):
        engine.forward_backward(batch_of(config, 1, 2), 64)
        before, weights = masters_of(engine), [p.detach().clone() for p in engine.model.parameters()]
        gradients = {name: engine.gradients.sums[p].double() for name, p in engine.model.named_parameters()}
        gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        numbers: dict[str, Any] = engine.step(rate, is_measured=True).numbers()
    after = masters_of(engine)
    changes = {name: after[name] - before[name] for name in after}
    # A sample of 512 of some thousand numbers that are much alike: its norm is within 1 / sqrt(2 * 512) or so.
    tolerance = 1e-5 if sampled == 10_000 else 0.1
    changed: dict[str, list[Tensor]] = {}
    for (name, parameter), weight in zip(engine.model.named_parameters(), weights, strict=True):
        changed.setdefault(part_of(name), []).append((parameter != weight).flatten())
    assert list(numbers["grad_norms"]) == list(PARTS)
    for part in PARTS:
        assert numbers["grad_norms"][part] == pytest.approx(norms(gradients, part), rel=1e-5)
        assert numbers["weight_norms"][part] == pytest.approx(norms(after, part), rel=tolerance)
        ratio = norms(changes, part) / norms(after, part)
        assert numbers["update_ratios"][part] == pytest.approx(ratio, rel=2 * tolerance)
        share = torch.cat(changed[part]).double().mean().item()
        assert numbers["changed"][part] == pytest.approx(share, abs=1e-9 if tolerance < 0.01 else 0.1)
    assert ("low_bits" in numbers) is (dtype == "bfloat16")
    if dtype == "bfloat16":
        low_bits = numbers["low_bits"]
        assert low_bits["attention"] == pytest.approx(1.0, abs=0.01)  # all 16 are 0 once in 65,536 numbers
        assert low_bits["norms"] == low_bits["router"] == 0.0, "the layers have float32 of them"
        assert 0.02 < numbers["changed"]["routed_experts"] < 0.98, "some updates are below the weights' last bit"
    sinks = [layer.self_attn.sinks.mean().item() for layer in engine.model.layers if layer.self_attn.sinks is not None]
    assert numbers["sink_mean"] == pytest.approx(sinks)
    biases = [layer.mlp.gate.e_score_correction_bias.abs().max().item() for layer in engine.model.layers]
    assert numbers["bias_max"] == pytest.approx(biases)


def test_masters_that_lose_their_low_bits(tmp_path: Path) -> None:
    engine = PlainEngine(run_config(tmp_path, train={"dtype": "bfloat16"}))
    for _ in range(2):
        engine.forward_backward(batch_of(engine.config, 1, 2), 64)
        numbers: dict[str, Any] = engine.step(3e-4, is_measured=True).numbers()
        for master in engine.masters.by_parameter.values():
            master.low_bits.zero_()
    assert set(numbers["low_bits"].values()) == {0.0}


def test_an_update_that_is_not_applied_changes_nothing(tmp_path: Path) -> None:
    engine = PlainEngine(run_config(tmp_path))
    engine.forward_backward(batch_of(engine.config, 1, 2), 64)
    engine.gradients.sums[engine.model.layers[0].mlp.gate.weight][0, 0] = torch.nan
    numbers: dict[str, Any] = engine.step(1e-2, is_measured=True).numbers()
    assert set(numbers["changed"].values()) == set(numbers["update_ratios"].values()) == {0.0}
    assert numbers["bias_load_correlation"] == [0.0, 0.0]
    finite = {part: norm for part, norm in numbers["grad_norms"].items() if norm == norm}
    assert set(PARTS) - set(finite) == {"router"}, "the part of the gradient that is not finite is named"


@pytest.mark.parametrize("sign, expected", [(1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)])
def test_a_bias_that_moves_against_the_loads_correlates(sign: float, expected: float) -> None:
    loads_LE = torch.tensor([[1, 2, 3, 10], [7, 1, 0, 0]])
    missing_LE = loads_LE.double().mean(1, keepdim=True) - loads_LE
    before_LE = torch.randn(2, 4)
    found = bias_numbers(before_LE, before_LE + sign * 1e-2 * missing_LE.float(), loads_LE)
    torch.testing.assert_close(found["bias_load_correlation"], torch.full((2,), expected).double(), atol=1e-4, rtol=0)


def test_a_router_that_tells_no_experts_apart_has_the_greatest_entropy(tmp_path: Path) -> None:
    engine = PlainEngine(run_config(tmp_path, model={"scoring_func": "softmax"}))
    first, second = (layer.mlp.gate for layer in engine.model.layers)
    first.weight.data.zero_()
    second.weight.data.mul_(0.0)[0] = 1e4  # all of a token's score, or none, goes to the first expert
    engine.forward_backward(batch_of(engine.config, 1, 2), 64)
    numbers: dict[str, Any] = engine.step(1e-9, is_measured=True).numbers()
    assert numbers["router_entropy"][0] == pytest.approx(1.0)
    # Where it is none, the three others share the score evenly: ln 3 / ln 4.
    assert 0 < numbers["router_entropy"][1] < 0.8


@pytest.mark.parametrize("preset", preset_names())
def test_every_parameter_of_every_preset_has_its_part(preset: str) -> None:
    config = load(preset).model
    if not config.vocab_size:
        return
    with torch.device("meta"):
        model = Transformer(config)
    for name, parameter in model.named_parameters():
        part, owner = part_of(name), name.split(".")[-2]
        expected = {
            "embed_tokens": "embedding", "lm_head": "head", "gate": "router", "experts": "routed_experts",
            "self_attn": "sinks",
        }.get(owner)  # fmt: skip
        if expected is None:
            is_norm = parameter.ndim == 1
            expected = "norms" if is_norm else "shared_experts" if "shared" in name else "attention"
        assert part == expected, name


def test_sums_by_part_keep_what_is_not_finite_apart() -> None:
    by_part = ByPart(["model.embed_tokens.weight", "lm_head.weight"], ["embedding", "head"], torch.device("cpu"))
    found = by_part.sum(torch.tensor([torch.nan, 2.0]))
    assert found[0].isnan()
    assert found[1] == 2
