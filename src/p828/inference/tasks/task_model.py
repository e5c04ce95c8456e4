"""A model as tasks ask for it: by text, for log-likelihoods and continuations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError
from p828.inference.generate import Prompt, open_decoder, pieces, seeded
from p828.inference.load import LoadedModel
from p828.inference.loglikelihood import Request, Score, loglikelihoods
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from p828.system.slow_count import SlowCount

MAX_NEW_TOKENS = 256  # where a task gives none, as lm-eval's own models
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given holds
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@dataclass(frozen=True)
class TaskModel:
    """Answers with the numbers that lm-eval's `hf` model gives for the same weights.

    Text is only ever text, though: where it spells a special token it gets other tokens, as in training.
    """

    model: Transformer
    tokenizer: Tokenizer
    dtype: torch.dtype
    batch_tokens: int
    """Tokens put through the model at once, about."""
    batch_rows: int
    """Prompts continued at once."""
    report: Callable[[str], None]
    """Gets a line now and then about work that takes long."""

    @classmethod
    def of(cls, loaded: LoadedModel, rows: int, report: Callable[[str], None]) -> "TaskModel":
        """A model from disk. `rows` of the run's sequence length are put through it at once; 0 takes the run's."""
        rows = rows or loaded.config.train.micro_batch_size
        tokens = rows * loaded.config.data.sequence_length
        return cls(loaded.model, loaded.tokenizer, loaded.dtype, tokens, rows, report)

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Of each (context, continuation); an empty context is the end of another document, as where a document begins.

        Both are tokenized together, and the tokens behind as many as the context has by itself are scored. Spaces at
        the context's end are scored with the continuation, since a token may begin with them.
        """
        return self.score([self._request(*pair) for pair in pairs])

    def ending_loglikelihoods(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Of each ending of each (context, endings), in nats, given the tokens that begin all of an item's texts.

        Where a token reaches over the border between context and ending, what it has of the context is scored with
        every ending of the item, so that they compare.
        """
        requests = [request for context, endings in items for request in self._of_endings(context, endings)]
        scores = iter(self.score(requests))
        return [[next(scores).nats for _ in endings] for _, endings in items]

    def document_loglikelihoods(self, texts: Sequence[str]) -> list[float]:
        """Of each whole text, which begins a document, in nats. A long one is scored in windows of the full context."""
        eos = [self.tokenizer.eos_id]
        return [score.nats for score in self.score([Request(eos, self.tokenizer.encode(text)) for text in texts])]

    def continuations(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """The continuation of each prompt, ended before the first stop string, with a task's generation settings.

        A prompt loses its beginning where the context has no room for `max_gen_toks` besides; half of the context is
        left to it. Raises ConfigError for a setting that is not known here.
        """
        sampling = sampling_of(settings)
        context = self.model.config.max_position_embeddings
        room = max(context - sampling.max_new_tokens, context // 2, 1)
        ids = [self.tokenizer.encode(prompt)[-room:] for prompt in prompts]
        return self.complete(list(seeded(prompts, ids, sampling.seed)), sampling)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """As `loglikelihoods` of tokens."""
        count = SlowCount(self.report, f"{{:,}} of about {len(requests):,} texts scored")
        return loglikelihoods(self.model, requests, self.dtype, self.batch_tokens, count.to)

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[str]:
        """The continuation of each prompt; `sampling.seed` is in theirs."""
        if not prompts:
            return []
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
        lengths = [len(prompt.ids) for prompt in prompts]
        texts = [""] * len(prompts)
        count = SlowCount(self.report, f"{{:,}} of {len(prompts):,} prompts continued")
        done = 0
        sizes = lengths, sampling.max_new_tokens, self.batch_rows
        with open_decoder(self.model, self.tokenizer, self.dtype, *sizes) as decoder:
            queue = (prompts[index] for index in order)
            for piece in pieces(decoder, self.tokenizer, queue, sampling, self.tokenizer.end_ids):
                if piece.completion is not None:
                    texts[order[piece.place]] = piece.completion.text
                    done += 1
                    count.to(done)
        return texts

    def _request(self, context: str, continuation: str) -> Request:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, own = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
        if not own:
            return Request([self.tokenizer.eos_id], whole)
        if len(own) < len(whole):  # as lm-eval's own models, also where a token reaches over the border
            return Request(own, whole[len(own) :])
        return self._of_endings(context, [continuation])[0]

    def _of_endings(self, context: str, endings: Sequence[str]) -> list[Request]:
        texts = [self.tokenizer.encode(context), *(self.tokenizer.encode(context + ending) for ending in endings)]
        shared = next((n for n, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1), None)
        shared = min(map(len, texts)) if shared is None else shared
        return [Request(text[:shared] or [self.tokenizer.eos_id], text[shared:]) for text in texts[1:]]


def sampling_of(settings: Mapping[str, Any]) -> SamplingConfig:
    """The `generation_kwargs` of lm-eval's tasks. Without `do_sample` or a temperature, the likeliest tokens are taken.

    Raises ConfigError for one that is not known, or out of range.
    """
    known = ("until", "do_sample", *LENGTHS, *SAMPLING)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigError(f"generation_kwargs: {unknown[0]} is given: {', '.join(known)} are accepted")
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    found = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    if settings.get("do_sample") is False or not found.get("temperature"):
        found["temperature"] = 1.0 if settings.get("do_sample") and "temperature" not in found else 0.0
    lengths = [int(settings[name]) for name in LENGTHS if settings.get(name) is not None]
    return SamplingConfig(
        **found, max_new_tokens=[*lengths, MAX_NEW_TOKENS][0], stop=tuple(stop for stop in until if stop)
    )
