"""Prompts continued by a decoder, until all have ended."""

from collections.abc import Sequence

import torch

from p828.inference.decode.captured_steps import has_room
from p828.inference.decode.cpu_steps import CpuSteps
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence
from p828.inference.decode.steps import Flight
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer


def decoded(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    eos_id: int = 96,
    vocab_size: int = 97,
    slots: int = 2,
) -> list[DecodedSequence]:
    """In float32; a prompt that finds no slot waits for one."""
    decoder = Decoder(model, vocab_size, eos_id, torch.float32, slots)
    waiting, sequences = list(prompts), []
    while waiting or decoder.running:
        while waiting and decoder.free_slots:
            sequences.append(decoder.admit(waiting.pop(0), config, seed=0))
        decoder.step()
    decoder.check_idle()
    return sequences


class StepsAtOnce(CpuSteps):
    """As on a GPU with a small model: three steps are started at once, and their tokens known with the next ones."""

    runs_behind = True

    def continue_(
        self, sequences: Sequence[DecodedSequence], lengths: Sequence[int], may_be_several: bool
    ) -> Sequence[Flight]:
        flights: list[Flight] = []
        for done in range(3 if may_be_several and has_room(sequences, lengths, 3) else 1):
            flights += super().continue_(sequences, [length + done for length in lengths], False)
        return flights


def starts_steps_at_once(decoder: Decoder) -> Decoder:
    """The same, before it has read anything."""
    rows = decoder._rows
    decoder._steps = StepsAtOnce(decoder._steps.model, decoder._cache, rows, rows.vocab_size, torch.float32)
    return decoder
