"""Continue text: prompts to tokens, and tokens to text, given out as soon as it is certain."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from p828.data.tokenizer.tokenizer import CUT_CHARACTER, Tokenizer
from p828.errors import ConfigError
from p828.inference.decode.continuations import decode
from p828.inference.decode.sequence import FinishReason
from p828.inference.sampling import SamplingConfig
from p828.model.transformer import Transformer

MOST_OF_A_CHARACTER = 4  # tokens of a character that is cut off, and one more
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    text: str
    """The continuation, without the prompt."""
    finish_reason: FinishReason
    """As `Continuation.finish_reason`; `stop`: a stop string."""


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    on_text: OnText = lambda index, text: None,
    dtype: torch.dtype = torch.float32,
) -> list[Completion]:
    """The continuation of every prompt, computed in `dtype`.

    An empty prompt begins a document. `on_text(index of the prompt, text)` gets each piece of text as it becomes
    certain. What a prompt gets does not depend on the others, but for the rounding of matrix products of another size;
    equal prompts get different samples. Global random states and the model's training mode stay as they are.

    Raises ConfigError for a prompt that is no valid Unicode or fills the model's context, and for a model whose weights
    diverged.
    """
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    return continued(model, tokenizer, list(prompts), ids, config, on_text, dtype)


def continued(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    on_text: OnText,
    dtype: torch.dtype,
    end_ids: Collection[int] = (),
) -> list[Completion]:
    """As `generate`, of prompts whose tokens are `ids`, which the model ends by EOS or one of `end_ids`."""
    for prompt_ids in ids:
        _check_length(prompt_ids, model.config.max_position_embeddings)
    streams = [TextStream(tokenizer, prompt_ids or [tokenizer.eos_id], config.stop) for prompt_ids in ids]
    pieces: list[list[str]] = [[] for _ in prompts]

    def take(index: int, token: int, finish_reason: FinishReason | None) -> bool:
        text = "" if finish_reason == "end" else streams[index].push(token)
        if finish_reason is not None:
            text += streams[index].finish()
        if text:
            pieces[index].append(text)
            on_text(index, text)
        return streams[index].stopped

    seeds = [prompt_seed(config.seed, prompt, prompts[:index].count(prompt)) for index, prompt in enumerate(prompts)]
    continuations = decode(model, ids, config, seeds, tokenizer.eos_id, tokenizer.vocab_size, dtype, take, end_ids)
    return [
        Completion("".join(text), continuation.finish_reason)
        for text, continuation in zip(pieces, continuations, strict=True)
    ]


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"the prompt {prompt!r} is not valid Unicode text") from None
    return tokenizer.encode(prompt)


def _check_length(ids: Sequence[int], context: int) -> None:
    if len(ids) >= context:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens: at most {context - 1} are accepted, "
            f"for the model's context (model.max_position_embeddings) is {context}"
        )


def prompt_seed(seed: int, prompt: str, equal_before: int) -> int:
    """What a prompt draws by, 63 bits: a function of the seed, the prompt and the number of equal prompts before it.

    So a prompt's place among others does not matter, and equal prompts get different samples.
    """
    key = repr((seed, prompt, equal_before))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


class TextStream:
    """The text of one continuation: whole characters only, ended before the first stop string.

    Text that may be the beginning of a stop string is held back until more tokens, or `finish`, decide.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        # Tokens from `_begin` on are decoded together, since a tokenizer may treat the first one that gives text
        # specially; those before `_decoded` have given theirs.
        self._ids = list(prompt_ids)
        self._begin, self._decoded = 0, len(self._ids)
        self._held = ""

    def push(self, token: int) -> str:
        """Text that has become certain with this token, maybe none."""
        self._ids.append(token)
        # Without text of its own a token is special, or a space that some tokenizers drop at the end.
        if self._tokenizer.is_byte(token) or not self._tokenizer.decode([token]):
            return ""
        text = self._undecoded()
        if not self._is_whole(text):
            return ""
        self._begin, self._decoded = self._decoded, len(self._ids)
        return self._release(text, end=False)

    def finish(self) -> str:
        """The text still held back, for no token follows; a character that was cut off is left out."""
        if self.stopped:
            return ""
        text = whole = self._undecoded()
        for _ in range(MOST_OF_A_CHARACTER):
            if self._is_whole(whole) or len(self._ids) == self._decoded:
                break
            self._ids.pop()
            whole = self._undecoded()
        else:
            whole = whole.rstrip(CUT_CHARACTER)
        # The token in which the cut-off character begins may have text before it.
        rest = text.removeprefix(whole).rstrip(CUT_CHARACTER) if text.startswith(whole) else ""
        return self._release(whole + rest, end=True)

    def _undecoded(self) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._decoded])
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]

    def _is_whole(self, text: str) -> bool:
        """Whether the text of the newest tokens ends with a whole character."""
        return not text.endswith(CUT_CHARACTER) or self._tokenizer.ends_whole(self._ids[self._begin :])

    def _release(self, text: str, end: bool) -> str:
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            # The first to be complete, as if the text came character by character and not in tokens.
            self.stopped = True
            return text[: min(found)[1]]
        certain = len(text) if end else len(text) - self._possible_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        lengths = range(max(map(len, self._stop), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop if n <= len(text))), 0)
