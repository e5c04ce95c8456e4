"""Time what the host does for a decoding step beside starting it on the device.

usage: python benchmarks/decode_host.py [SEQUENCES ...]

The decoder runs with steps that give every sequence the same token and compute nothing, as soon as they are started. A
row is the least of some windows of steps, in the thread's own time, so that other programs do not count.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from p828.bench.systems import load_shape
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.rows import drawing_of
from p828.inference.decode.sequence import DecodedSequence
from p828.inference.decode.steps import Flight, PlainSteps
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer

WINDOWS, STEPS = 25, 60


class NoSteps(PlainSteps):
    """Of the host's part of `CapturedSteps` what is not PyTorch's."""

    runs_behind = True
    told_SC: Tensor

    def continue_(
        self, sequences: Sequence[DecodedSequence], lengths: Sequence[int], may_be_several: bool
    ) -> Sequence[Flight]:
        drawing_of(sequences)
        length = self.cache.max_length
        places = [sequence.slot * length + at for sequence, at in zip(sequences, lengths, strict=True)]
        return [Flight(sequences, self.told_SC, None, None, None, places)]


def microseconds(model: Transformer, sequences: int) -> float:
    decoder = Decoder(model, 256, -1, torch.float32, slots=sequences)
    decoder._steps = steps = NoSteps(model, decoder._cache, decoder._rows, 256, torch.float32)
    steps.told_SC = torch.ones(sequences * decoder.max_length, dtype=torch.int32)
    for seed in range(sequences):
        decoder.admit([1, 2, 3], SamplingConfig(temperature=0, max_new_tokens=2**20), seed)
    while decoder._unread:
        decoder.step()
    found = []
    for _ in range(WINDOWS):
        begin = time.thread_time()
        for _ in range(STEPS):
            decoder.step()
        found.append((time.thread_time() - begin) / STEPS)
    assert len(decoder.running) == sequences, "a sequence ended while it was timed"
    return 1e6 * min(found)


def main() -> None:
    shape = load_shape("60m", "cpu", 0, 0).model
    model = Transformer(dataclasses.replace(shape, vocab_size=256, hidden_size=64, moe_intermediate_size=64)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for sequences in map(int, sys.argv[1:] or ("1", "16", "64", "256")):
        print(f"{sequences} sequences: {microseconds(model, sequences):.1f} µs a step", flush=True)


if __name__ == "__main__":
    main()
