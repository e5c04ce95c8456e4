"""Continue prompts with a model, several at once, each as if it were alone.

B counts the rows still running, S the tokens of the longest prompt, V the model's vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from p828.data.tokenizer import Tokenizer
from p828.errors import ConfigError, NotFinite
from p828.inference.mode import inference
from p828.inference.sampling import SamplingConfig, sample
from p828.inference.text import TextStream
from p828.model.kv_cache import KVCache
from p828.model.transformer import Layer, Transformer

OnText = Callable[[int, str], None]
FinishReason = Literal["end", "stop", "length", "context"]


@dataclass(frozen=True)
class Completion:
    text: str
    """The continuation, without the prompt."""
    finish_reason: FinishReason
    """`end`: the model ended the document; `stop`: a stop string; `length`: max_new_tokens; `context`: the model's
    context is full."""


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    on_text: OnText | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Completion]:
    """The continuation of every prompt, computed in `dtype`.

    An empty prompt begins a document. `on_text(index of the prompt, text)` gets each piece of text as it becomes
    certain. What a prompt gets does not depend on the others, but for the rounding of matrix products of another size;
    equal prompts get different samples. Global random states and the model's training mode stay as they are.

    Raises ConfigError for a prompt that is no valid Unicode or fills the model's context, and for a model whose weights
    diverged.
    """
    context = model.config.max_position_embeddings
    device = model.head_weight.device
    prompts = list(prompts)
    rows = [
        _Row(
            tokenizer, _encode(tokenizer, prompt, context), config, context, _generator(config, prompts, index, device)
        )
        for index, prompt in enumerate(prompts)
    ]
    running = list(range(len(rows)))
    with inference(model), _uncompiled(model):
        cache = None
        while running:
            active = [rows[index] for index in running]
            if cache is None:
                longest = max(len(row.ids) for row in rows)
                cache_length = min(longest + config.max_new_tokens, context)
                cache = KVCache(model.config, len(rows), cache_length, device, dtype)
                logits_BV = _prefill(model, active, cache, dtype)
            else:
                logits_BV = _step(model, active, cache, dtype)
            tokens = _sample(logits_BV[:, : tokenizer.vocab_size], config, active)
            for index, token in zip(running, tokens, strict=True):
                text = rows[index].take(token)
                if text and on_text is not None:
                    on_text(index, text)
            kept = [i for i, row in enumerate(active) if row.finish_reason is None]
            if len(kept) < len(active):
                cache.select(torch.tensor(kept, dtype=torch.int64, device=device))
                running = [running[i] for i in kept]
    return [row.completion() for row in rows]


class _Row:
    """One prompt on its way."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        config: SamplingConfig,
        context: int,
        generator: torch.Generator,
    ) -> None:
        self.ids = prompt_ids or [tokenizer.eos_id]
        """The tokens so far."""
        self.seen = set(prompt_ids)
        """Those under the repetition penalty: not the EOS that stands for the beginning of a document."""
        self.generator = generator
        self.finish_reason: FinishReason | None = None
        self._eos_id = tokenizer.eos_id
        self._stream = TextStream(tokenizer, self.ids, config.stop)
        self._length_end = len(self.ids) + config.max_new_tokens
        self._context_end = context
        self._pieces: list[str] = []

    def take(self, token: int) -> str:
        """Add a token; returns text that has become certain and sets `finish_reason` if it was the last one."""
        text = ""
        if token == self._eos_id:
            self.finish_reason = "end"
        else:
            self.ids.append(token)
            self.seen.add(token)
            text = self._stream.push(token)
            if len(self.ids) == self._length_end:
                self.finish_reason = "length"
            elif len(self.ids) == self._context_end:
                self.finish_reason = "context"
        if self.finish_reason is not None:
            text += self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"
        self._pieces.append(text)
        return text

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion("".join(self._pieces), self.finish_reason)


def _uncompiled(model: Transformer) -> AbstractContextManager[None]:
    """Compiled layers run as they were written, since a trainer's would be compiled anew for each length."""
    return torch.compiler.set_stance("force_eager") if any(map(_is_compiled, model.layers)) else nullcontext()


def _is_compiled(layer: Layer) -> bool:
    """As a whole, by the plain engine, or its `forward` alone, by DeepSpeed's."""
    return layer._compiled_call_impl is not None or "forward" in vars(layer)


def _encode(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"the prompt {prompt!r} is not valid Unicode text") from None
    ids = tokenizer.encode(prompt)
    if len(ids) >= context:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens: at most {context - 1} are accepted, "
            f"for the model's context (model.max_position_embeddings) is {context}"
        )
    return ids


def _generator(config: SamplingConfig, prompts: Sequence[str], index: int, device: torch.device) -> torch.Generator:
    """Seeded by seed, prompt and number of equal prompts before it, so that a prompt's place does not matter."""
    key = repr((config.seed, prompts[index], prompts[:index].count(prompts[index])))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def _prefill(model: Transformer, rows: Sequence[_Row], cache: KVCache, dtype: torch.dtype) -> Tensor:
    """Read the prompts, padded on the right; logits after the last token of each."""
    device = model.head_weight.device
    lengths_B = torch.tensor([len(row.ids) for row in rows], device=device)
    longest = max(len(row.ids) for row in rows)
    tokens_BS = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)
    cache.extend(longest)
    hidden_BSH = model(tokens_BS, cache=cache, dtype=dtype).hidden_BSH
    return model.logits(hidden_BSH[torch.arange(len(rows), device=device), lengths_B - 1])


def _step(model: Transformer, rows: Sequence[_Row], cache: KVCache, dtype: torch.dtype) -> Tensor:
    """Read the newest token of each row; logits after it."""
    device = model.head_weight.device
    tokens_B1 = torch.tensor([row.ids[-1:] for row in rows], device=device)
    positions_B1 = torch.tensor([[len(row.ids) - 1] for row in rows], device=device)
    cache.extend(max(len(row.ids) for row in rows))
    return model.logits(model(tokens_B1, positions_B1, cache=cache, dtype=dtype).hidden_BSH[:, 0])


def _sample(logits_BV: Tensor, config: SamplingConfig, rows: Sequence[_Row]) -> list[int]:
    if not logits_BV.isfinite().all():
        raise NotFinite("the model's logits are not finite numbers: its weights diverged; take an earlier checkpoint")
    seen_BV = None
    if config.repetition_penalty != 1:
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for seen_V, row in zip(seen_BV, rows, strict=True):
            seen_V[list(row.seen)] = True
    tokens: list[int] = sample(logits_BV, config, seen_BV, [row.generator for row in rows]).tolist()
    return tokens
