"""Continue text: prompts to tokens, and tokens to text, given out as soon as it is certain."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from p828.config.values import shown
from p828.data.tokenizer.tokenizer import CUT_CHARACTER, Tokenizer
from p828.errors import ConfigError
from p828.inference.decode.decoder import Decoder, not_finite
from p828.inference.decode.sequence import NOTHING_MORE, DecodedSequence, FinishReason, NewToken, Wants
from p828.inference.evaluate import evaluation_mode, uncompiled
from p828.inference.sampling_config import SamplingConfig
from p828.model.backend import decode_dtype
from p828.model.transformer import Transformer
from p828.system.host_memory import free_host_bytes

MOST_OF_A_CHARACTER = 4  # tokens of a character that is cut off, and one more
MOST_TOGETHER = 64  # prompts: more of them make each one slower, and all of them hardly faster
CACHE_SHARE = 0.25  # of the free memory is the most that keys and values take
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    text: str
    """The continuation, without the prompt."""
    finish_reason: FinishReason
    """`end`: the model ended the document or its answer; `stop`: a stop string; `length`: max_new_tokens; `context`:
    the model's context is full."""
    ids: tuple[int, ...]
    """Its tokens, with those of a stop string and without the one that ends."""


class Prompt(NamedTuple):
    """A prompt as a decoder takes it."""

    ids: Sequence[int]
    seed: int
    """As `prompt_seed` gives it."""


class Piece(NamedTuple):
    """What one more token of a continuation brought."""

    place: int
    """Of the prompt, among all."""
    text: str
    """What has become certain, maybe nothing."""
    token: NewToken
    completion: Completion | None
    """All of it, with the last token."""
    step: int
    """Of the decoder: tokens of one step come at the same time."""


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

    Raises ConfigError for a prompt that is no text, is no valid Unicode or fills a model's context that may not slide,
    and for a model whose weights diverged.
    """
    ids = [encode(tokenizer, prompt) for prompt in prompts]
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
    for prompt_ids in ids if not config.slide else ():
        check_length(prompt_ids, model.config.max_position_embeddings)
    if not ids:
        return []
    completions: dict[int, Completion] = {}
    with open_decoder(model, tokenizer, dtype, [len(own) for own in ids], config.max_new_tokens) as decoder:
        for piece in pieces(decoder, tokenizer, seeded(prompts, ids, config.seed), config, end_ids):
            if piece.text:
                on_text(piece.place, piece.text)
            if piece.completion is not None:
                completions[piece.place] = piece.completion
    return [completions[index] for index in range(len(ids))]


@contextmanager
def open_decoder(
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    lengths: Sequence[int],
    max_new_tokens: int,
    most: int = MOST_TOGETHER,
) -> Iterator[Decoder]:
    """A decoder for prompts of these `lengths`, in tokens.

    It has `most` slots at most, and no more than have room in a quarter of the free memory. The model is in evaluation
    mode in the block, without gradients, and compiled layers run as they were written.
    """
    length = min(max([1, *lengths]) + max_new_tokens, model.config.max_position_embeddings)
    slots = max(min(len(lengths), most, _slots_with_room(model, dtype, length)), 1)
    with evaluation_mode(model), uncompiled(model):
        yield Decoder(model, tokenizer.vocab_size, tokenizer.eos_id, dtype, slots, length)


def pieces(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    config: SamplingConfig,
    end_ids: Collection[int] = (),
    wants: Wants = NOTHING_MORE,
) -> Generator[Piece, None, None]:
    """What each token brings, of all prompts together: a waiting one is taken when a slot is free.

    Where the caller closes the iterator, or an error ends it, the decoder is free again.
    """
    waiting = enumerate(prompts)
    running: dict[DecodedSequence, _Running] = {}
    step = 0
    try:
        while True:
            while decoder.free_slots and (following := next(waiting, None)):
                place, prompt = following
                sequence = decoder.admit(prompt.ids, config, prompt.seed, end_ids, wants)
                stream = TextStream(tokenizer, prompt.ids or [tokenizer.eos_id], config.stop)
                running[sequence] = _Running(place, stream, [], [])
            if not running:
                return
            step += 1
            for token in decoder.step():
                if token.sequence not in running:  # it ended at a stop string, some tokens ago
                    continue
                if token.finish_reason == "diverged":
                    raise not_finite()
                text, completion = running[token.sequence].take(token)
                place = running[token.sequence].place
                if completion is not None:
                    del running[token.sequence]
                    _cancel(decoder, token.sequence)
                yield Piece(place, text, token, completion, step)
    finally:
        for sequence in running:
            _cancel(decoder, sequence)


def _cancel(decoder: Decoder, sequence: DecodedSequence) -> None:
    """Unless it has ended by itself."""
    if sequence.finish_reason is None:
        decoder.cancel(sequence)


class _Running(NamedTuple):
    """A continuation on the way."""

    place: int
    stream: "TextStream"
    ids: list[int]
    texts: list[str]

    def take(self, token: NewToken) -> tuple[str, Completion | None]:
        """The text that one more token brings, and all of the continuation if it is the last one."""
        text = ""
        if token.finish_reason != "end":
            self.ids.append(token.token)
            text = self.stream.push(token.token)
        if token.finish_reason is not None:
            text += self.stream.finish()
        self.texts.append(text)
        reason: FinishReason | None = "stop" if self.stream.stopped else token.finish_reason
        return text, Completion("".join(self.texts), reason, tuple(self.ids)) if reason else None


def seeded(prompts: Iterable[str], ids: Iterable[Sequence[int]], seed: int) -> Iterator[Prompt]:
    """Each prompt with a seed of its own: its place among the others does not matter, and equal ones differ."""
    copies: Counter[str] = Counter()
    for text, prompt_ids in zip(prompts, ids, strict=True):
        yield Prompt(prompt_ids, prompt_seed(seed, text, copies[text]))
        copies[text] += 1


def prompt_seed(seed: int, prompt: str, equal_before: int) -> int:
    """What a prompt draws by, 63 bits: a function of the seed, the prompt and the number of equal prompts before it."""
    key = repr((seed, prompt, equal_before))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens. Raises ConfigError if it is no text, or no valid Unicode."""
    if not isinstance(prompt, str):
        raise ConfigError(f"the prompt {shown(prompt)}: a text is accepted")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"the prompt {prompt!r} is not valid Unicode text") from None
    return tokenizer.encode(prompt)


def check_length(ids: Sequence[int], context: int) -> None:
    """Raises ConfigError for a prompt that leaves no room in the context."""
    if len(ids) >= context:
        raise ConfigError(
            f"the prompt has {len(ids):,} tokens: at most {context - 1:,} are accepted, "
            f"for the model's context (model.max_position_embeddings) is {context:,}"
        )


def _slots_with_room(model: Transformer, dtype: torch.dtype, length: int) -> int:
    device, config = model.head_weight.device, model.config
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    itemsize = decode_dtype(device, dtype).itemsize
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    return int(CACHE_SHARE * free) // (a_token * length)


class TextStream:
    """The text of one continuation: whole characters only, ended before the first stop string.

    Text that may be the beginning of a stop string is held back until more tokens, or `finish`, decide.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped = False
        self.length = 0
        """Characters of the whole text so far, with those that are held back and those of a stop string."""
        self._tokenizer, self._stop = tokenizer, stop
        # Tokens from `_begin` on are decoded together, since a tokenizer may treat the first one that gives text
        # specially; those before `_decoded` have given theirs.
        self._ids = list(prompt_ids)
        self._begin, self._decoded = 0, len(self._ids)
        self._held = ""

    def push(self, token: int) -> str:
        """Text that has become certain with this token, maybe none."""
        self._ids.append(token)
        if not self._tokenizer.gives_text(token):
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
        self.length += len(text)
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
