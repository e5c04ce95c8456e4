"""A model as `p828 generate` asks it: with the settings of its flags, for texts or answers."""

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field

from p828.errors import warn
from p828.inference.answer import ending
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import Wants
from p828.inference.generate import Completion, Piece, Prompt, open_decoder, pieces, prompt_seed
from p828.inference.load import LoadedModel
from p828.inference.prompts import GivenPrompt
from p828.inference.sampling_config import SamplingConfig
from p828.train.log.console import waiting


@dataclass
class Asking:
    loaded: LoadedModel
    sampling: SamplingConfig
    is_chat: bool
    """Whether prompts are messages, to be answered."""
    system: str
    wants_experts: bool
    _asked: Counter[str] = field(default_factory=Counter)
    """How many times each prompt was asked, for the next one's seed."""

    def __post_init__(self) -> None:
        if self.is_chat:
            self.sampling = ending(self.loaded.tokenizer, self.sampling)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its continuation."""
        return self.loaded.model.config.max_position_embeddings

    def encoded(self, prompt: GivenPrompt) -> Prompt:
        """A prompt's tokens, with the seed that it gets as the next one. Raises ConfigError and DataError."""
        context = None if self.sampling.slide else self.context
        text, ids = prompt.encoded(self.loaded.tokenizer, context, self.is_chat, self.system)
        self._asked[text] += 1
        return Prompt(ids, prompt_seed(self.sampling.seed, text, self._asked[text] - 1))

    def open_decoder(self, lengths: Sequence[int]) -> AbstractContextManager[Decoder]:
        """For prompts of these lengths in tokens."""
        loaded = self.loaded
        return open_decoder(loaded.model, loaded.tokenizer, loaded.dtype, lengths, self.sampling.max_new_tokens)

    def pieces(self, decoder: Decoder, prompts: Iterable[Prompt]) -> Generator[Piece, None, None]:
        """As `inference.generate.pieces`; a wait for the first token is told."""
        tokenizer, wants = self.loaded.tokenizer, Wants(experts=self.wants_experts)
        end_ids = tokenizer.end_ids if self.is_chat else ()
        with closing(pieces(decoder, tokenizer, prompts, self.sampling, end_ids, wants)) as found:
            with waiting("reading the prompt", warn):
                first = next(found, None)
            if first is not None:
                yield first
            yield from found

    def note(self, completion: Completion) -> None:
        """Say where the context ended a text."""
        if completion.finish_reason == "context":
            hint = "" if self.sampling.slide or self.wants_experts else " (--slide goes on)"
            warn(f"ended there: the model's context of {self.context} tokens is full{hint}")
