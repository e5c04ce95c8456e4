import math

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process

from p828.errors import ConfigError
from p828.inference.sampling import (
    choose_tokens,
    filter_logits,
    likeliest_tokens,
    row_settings,
    uniform_numbers,
)
from p828.inference.sampling_config import SamplingConfig

ROWS, VOCABULARY = 5, 40


def choose(logits_BV: Tensor, config: SamplingConfig, seen_BV: Tensor | None, uniform_B: Tensor) -> Tensor:
    settings = row_settings([config] * len(logits_BV), logits_BV.device)
    return choose_tokens(logits_BV, settings, uniform_B, seen_BV, has_filters=True)


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
    settings = row_settings([config] * ROWS, logits_BV.device)
    actual = filter_logits(logits_BV, settings, seen_BV if config.repetition_penalty != 1 else None)
    torch.testing.assert_close(actual, transformers_logits(logits_BV.clone(), config, ids_BS), rtol=0, atol=0)


def test_drawn_as_often_as_likely() -> None:
    probabilities_V = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.0, 0.05, 0.0])
    draws = 4000
    logits_BV = probabilities_V.log().clamp(min=-200).expand(draws, -1)
    counts_V = choose(logits_BV, SamplingConfig(temperature=1.0), None, uniform_numbers(5, draws)).bincount(minlength=7)

    # Four standard deviations of a binomial count.
    deviation_V = (draws * probabilities_V * (1 - probabilities_V)).sqrt()
    assert ((counts_V - draws * probabilities_V).abs() <= 4 * deviation_V).all()


def test_numbers_drawn_by_are_uniform() -> None:
    numbers = uniform_numbers(7, 100_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Four standard deviations: of a mean, sqrt(1/12 / n); of a count, sqrt(n/16 · 15/16).
    assert abs(numbers.mean().item() - 0.5) <= 4 * math.sqrt(1 / 12 / 100_000)
    counts = (numbers * 16).long().bincount()
    assert (counts - 6250).abs().max() <= 4 * math.sqrt(6250 * 15 / 16)
    assert torch.equal(uniform_numbers(7, 10), numbers[:10])
    assert not torch.equal(uniform_numbers(8, 10), numbers[:10])


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_the_interval_draw_possible_tokens(uniform: float, token: int) -> None:
    logits_1V = torch.tensor([[-300.0, 0.0, -300.0, 0.0, -300.0]])  # exp(−300) is 0 in float32
    assert choose(logits_1V, SamplingConfig(temperature=1.0), None, torch.tensor([uniform])).item() == token


def test_a_row_does_not_depend_on_the_others() -> None:
    """Each row's own settings, whatever the others need."""
    logits_BV = torch.randn(ROWS, VOCABULARY)
    configs = [
        SamplingConfig(temperature=0.0),
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=2.0, top_p=0.9),
        SamplingConfig(temperature=0.5, top_k=3, min_p=0.1),
        SamplingConfig(temperature=0.0, repetition_penalty=1.5),
    ]
    uniform_B, seen_BV = torch.rand(ROWS), torch.rand(ROWS, VOCABULARY) < 0.5
    together = choose_tokens(logits_BV, row_settings(configs, logits_BV.device), uniform_B, seen_BV, has_filters=True)
    for row, config in enumerate(configs):
        one = slice(row, row + 1)
        settings = row_settings([config], logits_BV.device)
        has_filters = row >= 2
        alone = choose_tokens(logits_BV[one], settings, uniform_B[one], seen_BV[one], has_filters)
        assert alone.item() == together[row].item()


def test_logits_that_are_no_numbers_are_told() -> None:
    logits_BV = torch.zeros(3, VOCABULARY)
    logits_BV[1, 7], logits_BV[2, 3] = math.nan, math.inf
    assert choose(logits_BV, SamplingConfig(), None, torch.rand(3)).tolist()[1:] == [-1, -1]


def test_the_likeliest_token_is_the_first_of_equal_ones_or_told_as_none() -> None:
    """Also of logits that lie in memory as a product left them, token by token."""
    logits_BV = torch.randn(5, VOCABULARY)
    logits_BV[0, [3, 9]] = 50.0
    for row, value in enumerate((math.nan, math.inf, -math.inf), 1):
        logits_BV[row, 7] = value
    expected = [3, -1, -1, -1, logits_BV[4].argmax().item()]
    assert likeliest_tokens(logits_BV).tolist() == expected
    assert likeliest_tokens(logits_BV.t().contiguous().t()).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1e-40])
def test_greedy_takes_the_likeliest_after_the_penalty(temperature: float) -> None:
    logits_BV = torch.tensor([[1.0, 4.0, 3.0], [-1.0, -4.0, -1.5]])
    config = SamplingConfig(temperature=temperature, repetition_penalty=2.0, top_k=1)
    assert choose(logits_BV, config, None, torch.rand(2)).tolist() == [1, 0]
    seen_BV = torch.tensor([[False, True, False], [True, False, False]])
    assert choose(logits_BV, config, seen_BV, torch.rand(2)).tolist() == [2, 2]


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
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("temperature", "1"),
        ("temperature", True),
        pytest.param("temperature", 10**400, id="temperature-too-large"),
        ("top_k", 1.5),
        ("top_p", None),
        ("min_p", [0]),
        ("repetition_penalty", "1"),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("stop", "text"),
        ("stop", ("a", 3)),
        ("stop", 3),
        ("seed", None),
        ("seed", 1.0),
    ],
)
def test_wrong_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = .* is accepted$"):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]
