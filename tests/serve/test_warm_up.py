"""Every size that a server's decoder may meet is met before the first request."""

import torch

from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import NewToken
from p828.serve.scheduling.warm_up import warm_up
from tiny import tiny_model


class NotingDecoder(Decoder):
    """Notes how many sequences have ever run at a time, and how long their prompts were."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.sizes: set[int] = set()
        self.lengths: set[int] = set()

    def step(self) -> list[NewToken]:
        self.lengths |= {sequence.prompt_length for sequence in self.running}
        tokens = super().step()
        self.sizes.add(len({new.sequence for new in tokens}))
        return tokens


def test_each_power_of_two_is_met() -> None:
    # EOS is a token that this model does not choose, so that no sequence ends early.
    decoder = NotingDecoder(tiny_model(), 90, 96, torch.float32, 6)
    warm_up(decoder, 6)
    assert decoder.sizes >= {1, 2, 4, 6}
    assert decoder.lengths == {1, 2, 4, 8, 16, 32, 63}
    assert decoder.free_slots == 6


def test_a_context_of_two_tokens_will_do() -> None:
    decoder = NotingDecoder(tiny_model(), 90, 96, torch.float32, 4, 2)
    warm_up(decoder, 4)
    assert decoder.lengths == {1}
