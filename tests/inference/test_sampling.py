import math

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process

from p828.errors import ConfigError
from p828.inference.sampling import SamplingConfig, filter_logits, sample

ROWS, VOCABULARY = 5, 40


def generators(rows: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 1000 + row) for row in range(rows)]


def transformers_logits(logits_BV: Tensor, config: SamplingConfig, ids_BS: Tensor) -> Tensor:
    """The logits as `transformers` processes them, in the order of its `generate`."""
    steps: list[logits_process.LogitsProcessor] = []
    if config.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(logits_process.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(logits_process.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(logits_process.TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(logits_process.MinPLogitsWarper(config.min_p))
    return logits_process.LogitsProcessorList(steps)(ids_BS, logits_BV)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0.7),
        SamplingConfig(temperature=1.0, top_k=1),
        SamplingConfig(temperature=1.3, top_k=7),
        SamplingConfig(temperature=1.0, top_k=1000),
        SamplingConfig(temperature=0.5, top_p=0.6),
        SamplingConfig(temperature=1.0, top_p=1e-9),
        SamplingConfig(temperature=2.0, min_p=0.2),
        SamplingConfig(temperature=1.0, min_p=1.0),
        SamplingConfig(temperature=1.0, repetition_penalty=1.4),
        SamplingConfig(temperature=1.0, repetition_penalty=0.6),
        SamplingConfig(temperature=1.5, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(config: SamplingConfig) -> None:
    logits_BV = 3 * torch.randn(ROWS, VOCABULARY)
    logits_BV[:, 3] = logits_BV[:, 5]  # a tie
    ids_BS = torch.randint(VOCABULARY, (ROWS, 9))
    seen_BV = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter(1, ids_BS, True)

    # The same float32 operations on the same values: not a bit may differ.
    actual = filter_logits(logits_BV, config, seen_BV if config.repetition_penalty != 1 else None)
    torch.testing.assert_close(actual, transformers_logits(logits_BV.clone(), config, ids_BS), rtol=0, atol=0)


def test_drawn_as_often_as_likely() -> None:
    probabilities_V = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = 4000
    logits_BV = probabilities_V.log().expand(draws, -1)
    config = SamplingConfig(temperature=1.0)
    counts_V = sample(logits_BV, config, None, generators(draws)).bincount(minlength=5)

    # Four standard deviations of a binomial count.
    deviation_V = (draws * probabilities_V * (1 - probabilities_V)).sqrt()
    assert ((counts_V - draws * probabilities_V).abs() <= 4 * deviation_V).all()
    assert counts_V[4] == 0


def test_a_row_does_not_depend_on_the_others() -> None:
    logits_BV = torch.randn(ROWS, VOCABULARY)
    config = SamplingConfig(temperature=1.0, top_p=0.9)
    together = sample(logits_BV, config, None, generators(ROWS))
    alone = [
        sample(logits_BV[row : row + 1], config, None, generators(ROWS)[row : row + 1]).item() for row in range(ROWS)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("temperature", [0.0, 1e-40])
def test_greedy_takes_the_likeliest_after_the_penalty(temperature: float) -> None:
    logits_BV = torch.tensor([[1.0, 4.0, 3.0], [-1.0, -4.0, -1.5]])
    config = SamplingConfig(temperature=temperature, repetition_penalty=2.0, top_k=1)
    assert sample(logits_BV, config, None, generators(2)).tolist() == [1, 0]
    seen_BV = torch.tensor([[False, True, False], [True, False, False]])
    assert sample(logits_BV, config, seen_BV, generators(2)).tolist() == [2, 2]


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-45),
        ("repetition_penalty", 1e38),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", math.inf),
        ("max_new_tokens", 0),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = .* is accepted$"):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
