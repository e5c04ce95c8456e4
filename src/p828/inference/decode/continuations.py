"""Continue token ids with a model, several prompts at once, each as if it were alone.

B counts the prompts still running, S the tokens of the longest prompt, V the model's vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from p828.errors import NotFinite
from p828.inference.decode.sequence import FinishReason
from p828.inference.evaluate import evaluation_mode, uncompiled
from p828.inference.sampling import SamplingConfig, sample
from p828.model.kv_cache import KVCache
from p828.model.transformer import Transformer

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
    generators: Sequence[torch.Generator],
    eos_id: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    on_token: OnToken = lambda index, token, finish_reason: False,
    end_ids: Collection[int] = (),
) -> list[Continuation]:
    """The continuation of every prompt, computed in `dtype`, of tokens below `vocab_size`.

    It ends before EOS and before any of `end_ids`. A prompt is shorter than the model's context; an empty one begins a
    document. Each prompt draws from its own generator, on the model's device. `on_token(index of the prompt, token,
    finish reason)` gets each token as it comes, with the reason if it is the last one, and ends the continuation by
    returning True. What a prompt gets does not depend on the others, but for the rounding of matrix products of another
    size. The model's training mode stays as it is. Raises NotFinite for a model whose weights diverged.
    """
    context = model.config.max_position_embeddings
    sequences = [
        _Sequence(prompt, generator, eos_id, config.max_new_tokens, context, end_ids)
        for prompt, generator in zip(prompts, generators, strict=True)
    ]
    running = list(range(len(sequences)))
    with evaluation_mode(model), uncompiled(model):
        cache = None
        while running:
            active = [sequences[index] for index in running]
            if cache is None:
                longest = max(len(sequence.ids) for sequence in sequences)
                cache_length = min(longest + config.max_new_tokens, context)
                cache = KVCache(model.config, len(sequences), cache_length, model.head_weight.device, dtype)
                logits_BV = _prefill(model, active, cache, dtype)
            else:
                logits_BV = _step(model, active, cache, dtype)
            tokens = _sample(logits_BV[:, :vocab_size], config, active)
            for index, token in zip(running, tokens, strict=True):
                sequence = sequences[index]
                sequence.take(token)
                if on_token(index, token, sequence.finish_reason):
                    sequence.finish_reason = "stop"
            kept = [i for i, sequence in enumerate(active) if sequence.finish_reason is None]
            if len(kept) < len(active):
                cache.select(torch.tensor(kept, dtype=torch.int64, device=model.head_weight.device))
                running = [running[i] for i in kept]
    return [sequence.continuation() for sequence in sequences]


class _Sequence:
    """One prompt and the tokens so far."""

    def __init__(
        self,
        prompt: Sequence[int],
        generator: torch.Generator,
        eos_id: int,
        max_new_tokens: int,
        context: int,
        end_ids: Collection[int],
    ) -> None:
        self.ids = list(prompt) or [eos_id]
        """The tokens so far; a document's beginning follows another document's end."""
        self.seen = set(prompt)
        """Those under the repetition penalty: not the EOS that stands for the beginning of a document."""
        self.generator = generator
        self.finish_reason: FinishReason | None = None
        self._end_ids, self._prompt_length = {eos_id, *end_ids}, len(self.ids)
        self._length_end, self._context_end = len(self.ids) + max_new_tokens, context

    def take(self, token: int) -> None:
        """Add a token; sets `finish_reason` if it is the last one."""
        if token in self._end_ids:
            self.finish_reason = "end"
            return
        self.ids.append(token)
        self.seen.add(token)
        if len(self.ids) == self._length_end:
            self.finish_reason = "length"
        elif len(self.ids) == self._context_end:
            self.finish_reason = "context"

    def continuation(self) -> Continuation:
        assert self.finish_reason is not None
        return Continuation(self.ids[self._prompt_length :], self.finish_reason)


def _prefill(model: Transformer, sequences: Sequence[_Sequence], cache: KVCache, dtype: torch.dtype) -> Tensor:
    """Read the prompts, padded on the right; logits after the last token of each."""
    device = model.head_weight.device
    lengths_B = torch.tensor([len(sequence.ids) for sequence in sequences], device=device)
    longest = max(len(sequence.ids) for sequence in sequences)
    padded = [sequence.ids + [0] * (longest - len(sequence.ids)) for sequence in sequences]
    cache.extend(longest)
    hidden_BSH = model(torch.tensor(padded, device=device), cache=cache, dtype=dtype).hidden_BSH
    return model.logits(hidden_BSH[torch.arange(len(sequences), device=device), lengths_B - 1])


def _step(model: Transformer, sequences: Sequence[_Sequence], cache: KVCache, dtype: torch.dtype) -> Tensor:
    """Read the newest token of each sequence; logits after it."""
    device = model.head_weight.device
    tokens_B1 = torch.tensor([sequence.ids[-1:] for sequence in sequences], device=device)
    positions_B1 = torch.tensor([[len(sequence.ids) - 1] for sequence in sequences], device=device)
    cache.extend(max(len(sequence.ids) for sequence in sequences))
    return model.logits(model(tokens_B1, positions_B1, cache=cache, dtype=dtype).hidden_BSH[:, 0])


def _sample(logits_BV: Tensor, config: SamplingConfig, sequences: Sequence[_Sequence]) -> list[int]:
    if not logits_BV.isfinite().all():
        raise NotFinite("the model's logits are not finite numbers: its weights diverged; take an earlier checkpoint")
    seen_BV = None
    if config.repetition_penalty != 1:
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for seen_V, sequence in zip(seen_BV, sequences, strict=True):
            seen_V[list(sequence.seen)] = True
    tokens: list[int] = sample(logits_BV, config, seen_BV, [sequence.generator for sequence in sequences]).tolist()
    return tokens
