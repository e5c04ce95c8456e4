"""How weights are cut over ranks, and in which order they are gathered."""

import pytest
import torch

from p828.engine.sharded.phases import phases_of
from p828.engine.sharded.units import ALIGNMENT, units_of
from p828.engine.sharded.weights import BUFFERS, following, slot_of
from p828.model.precision import matrices
from tiny import tiny_model


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_number_of_every_matrix_belongs_to_one_rank(size: int, is_tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=is_tied)
    wanted = {name: parameter.detach() for name, parameter in matrices(model)}
    units = units_of(model, size)
    found = {name: torch.full_like(parameter, torch.nan) for name, parameter in wanted.items()}
    for unit in units:
        flat = torch.zeros(unit.length)
        for name, view in unit.views(flat).items():
            view.copy_(wanted[name])
        assert unit.length % size == 0
        for rank, shard in enumerate(flat.chunk(size)):
            assert len(shard) == unit.length // size
            for name, offset, length, start, shape in unit.pieces(rank, size):
                assert shape == wanted[name].shape
                part = found[name].view(-1)[start : start + length]
                assert part.isnan().all(), "two ranks have it"
                part.copy_(shard[offset : offset + length])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in wanted.items())
    assert len(units) == 2 + 2 - is_tied
    assert all(place.start % ALIGNMENT == 0 for unit in units for place in unit.places)


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_every_unit_is_there_when_it_is_used(layers: int, is_tied: bool, stage: int) -> None:
    """Buffers played through for some micro-batches; at stage 3 the layers gather as often as two buffers make them."""
    reads = [phase.reads for phase in phases_of(layers, is_tied)]
    units = layers + 2 - is_tied
    slots = [0, *(1 + layer % BUFFERS for layer in range(layers)), 0][:units] if stage == 3 else list(range(units))
    after = following(reads, slots)
    held = {slots[number]: number for number in reversed(range(units))}  # what a step begins with
    gathers = 0
    for _ in range(3):
        gathers = 0
        for number, next_unit in zip(reads, after, strict=True):
            if number is not None:
                assert held[slots[number]] == number
            if next_unit is not None:
                assert held[slots[next_unit]] != next_unit
                assert slots[next_unit] == slots[number or 0]
                held[slots[next_unit]] = next_unit
                gathers += 1
    vocabulary = 0 if is_tied else 2
    assert gathers == (vocabulary + 2 * max(layers - BUFFERS, 0) if stage == 3 else 0)


def test_layers_take_turns_at_buffers() -> None:
    units = units_of(tiny_model(num_hidden_layers=3), 2)
    assert [slot_of(unit) for unit in units] == [0, 1, 2, 1, 0]
