"""Continue several prompts at once, and give each token as it comes."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence, FinishReason
from p828.inference.evaluate import evaluation_mode, uncompiled
from p828.inference.sampling import SamplingConfig
from p828.model.transformer import Transformer

MOST_TOGETHER = 64  # prompts; the others wait for a free slot
OnToken = Callable[[int, int, FinishReason | None], bool]


class Continuation(NamedTuple):
    ids: list[int]
    """The tokens after the prompt, without the one that ends it."""
    finish_reason: FinishReason
    """`end`: the model ended the document or its answer; `stop`: `on_token` said so; `length`: max_new_tokens;
    `context`: the model's context is full."""


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    seeds: Sequence[int],
    eos_id: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    on_token: OnToken = lambda index, token, finish_reason: False,
    end_ids: Collection[int] = (),
) -> list[Continuation]:
    """The continuation of every prompt, computed in `dtype`, of tokens below `vocab_size`.

    It ends before EOS and before any of `end_ids`. A prompt is shorter than the model's context; an empty one begins a
    document. Each prompt draws by its own seed. `on_token(index of the prompt, token, finish reason)` gets each token
    as it comes, with the reason if it is the last one, and ends the continuation by returning True. What a prompt gets
    does not depend on the others, but for the rounding of matrix products of another size. The model's training mode
    stays as it is. Raises NotFinite for a model whose weights diverged.
    """
    if not prompts:
        return []
    longest = max(max(map(len, prompts)), 1) + config.max_new_tokens
    found: dict[int, Continuation] = {}
    with evaluation_mode(model), uncompiled(model):
        decoder = Decoder(model, vocab_size, eos_id, dtype, min(len(prompts), MOST_TOGETHER), longest)
        waiting = deque(enumerate(zip(prompts, seeds, strict=True)))
        index_of: dict[DecodedSequence, int] = {}
        while len(found) < len(prompts):
            while waiting and decoder.free_slots:
                index, (prompt, seed) = waiting.popleft()
                index_of[decoder.admit(prompt, config, seed, end_ids)] = index
            for sequence, token, finish_reason, _, _ in decoder.step():
                index = index_of[sequence]
                if index in found:
                    continue
                if on_token(index, token, finish_reason):
                    if finish_reason is None:
                        decoder.cancel(sequence)
                    finish_reason = "stop"
                if finish_reason is not None:
                    found[index] = Continuation(sequence.continuation, finish_reason)
    return [found[index] for index in range(len(prompts))]
