"""Prompts continued by a decoder, until all have ended."""

from collections.abc import Sequence

import torch

from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence
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
