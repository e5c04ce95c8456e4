"""A step's results as the host takes them, and what its rows need of sampling."""

import itertools

import pytest
import torch

from p828.inference.decode.rows import drawing_of
from p828.inference.decode.sequence import NOTHING_MORE, DecodedSequence, sequence_of
from p828.inference.decode.steps import Flight
from p828.inference.sampling_config import Drawing, SamplingConfig


def sequence(config: SamplingConfig, slot: int = 0) -> DecodedSequence:
    return sequence_of([1, 2], 0, config, 0, (), NOTHING_MORE, slot, longest=16)


@pytest.mark.parametrize("places", [None, [7, 2, 2]])
def test_tokens_lie_one_after_another_or_at_places(places: list[int] | None) -> None:
    told = torch.arange(100, 110, dtype=torch.int32)
    sequences = [sequence(SamplingConfig(), slot) for slot in range(3)]
    results = list(Flight(sequences, told[:3] if places is None else told, None, None, None, places).results())
    assert [result[0] for result in results] == sequences
    assert [result[1:] for result in results] == [(100 + place, None, None) for place in places or range(3)]


CONFIGS = [
    SamplingConfig(temperature=temperature, top_p=top_p, repetition_penalty=penalty)
    for temperature, top_p, penalty in itertools.product((0.0, 1.0), (1.0, 0.5), (1.0, 1.5))
]


@pytest.mark.parametrize("configs", [*itertools.combinations(CONFIGS, 1), *itertools.combinations(CONFIGS, 2)])
def test_a_step_draws_as_some_row_needs(configs: tuple[SamplingConfig, ...]) -> None:
    has_penalty = any(config.repetition_penalty != 1 for config in configs)
    draws = has_penalty or any(config.temperature > 0 for config in configs)
    has_filters = has_penalty or any(config.temperature > 0 and config.top_p < 1 for config in configs)
    assert drawing_of([sequence(config) for config in configs]) == Drawing(draws, has_filters, has_penalty)
