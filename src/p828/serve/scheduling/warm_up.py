"""What a decoder prepares when it first meets a size, before a client waits for it."""

from collections.abc import Sequence

from p828.inference.decode.decoder import Decoder
from p828.inference.sampling import SamplingConfig

LONGEST_PIECE = 2048  # tokens of a prompt that are read at a time


def warm_up(decoder: Decoder, slots: int) -> None:
    """Decode with each number of sequences, and read a prompt of each length, for which a GPU captures a graph.

    They are the powers of two. The decoder is idle before and after.
    """
    for size in _powers_of_two(slots):
        # One prompt is read a step, and the first sequences have to last until all are.
        tokens = min(size + 2, decoder.max_length - 1)
        for top_p in (1.0, 0.9):  # filters have a graph of their own
            _run(decoder, [[0]] * size, SamplingConfig(top_p=top_p, max_new_tokens=tokens))
    for length in _powers_of_two(min(LONGEST_PIECE, decoder.max_length - 1)):
        _run(decoder, [[0] * length], SamplingConfig(max_new_tokens=1))
    decoder.check_idle()


def _run(decoder: Decoder, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
    for seed, prompt in enumerate(prompts):
        decoder.admit(prompt, config, seed)
    while decoder.running:
        decoder.step()


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return [1 << power for power in range((most - 1).bit_length())] + [most]
