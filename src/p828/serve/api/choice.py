"""One answer: from the tokens of a submission to pieces of text, each with its tokens."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.decode.sequence import FinishReason, NewToken, TokenProbability
from p828.inference.generate import TextStream
from p828.serve.scheduling.submission import Submission


class Prompt(NamedTuple):
    text: str
    """What was asked, from which the seed follows. Of token ids their text."""
    ids: Sequence[int]
    end_ids: Sequence[int] = ()
    """Tokens that end an answer, beside EOS."""
    offsets: Sequence[int] = ()
    """Where in the text each token begins, in characters, if that is wanted."""
    is_echoed: bool = False
    """Whether the answer's text begins with the prompt."""
    is_all: bool = False
    """Whether nothing comes after an echoed prompt."""


class PlacedToken(NamedTuple):
    token: int
    offset: int
    """Where in the text it begins, in characters; a character of several tokens begins with the first of them."""
    probability: TokenProbability | None
    experts_LK: tuple[tuple[int, ...], ...] | None


@dataclass
class Piece:
    """Text that has become certain, and the tokens that came with it."""

    text: str = ""
    tokens: list[PlacedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Choice:
    """One answer to one prompt, as it comes."""

    def __init__(
        self, index: int, prompt: Prompt, submission: Submission, tokenizer: Tokenizer, stop: Sequence[str]
    ) -> None:
        self.index, self.prompt, self.submission = index, prompt, submission
        self.num_tokens = 0
        """Tokens of the answer so far, with the one that ends it."""
        self._stream = TextStream(tokenizer, prompt.ids or [tokenizer.eos_id], stop)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """At least one; the last has the finish reason. Text and tokens together are all there is. Raises Unanswered.

        A token comes with the first text after it, and so may wait for the rest of its character or of a stop string.
        """
        piece, has_begun = Piece(), False
        async for tokens in self.submission:
            if not has_begun and self.prompt.is_echoed:  # whose probabilities are known with the first token
                piece = self._prompt_piece()
            has_begun = True
            if self.prompt.is_all:
                self.submission.stop()
                piece.finish_reason = "length"
            else:
                self._add(piece, tokens)
            if piece.text or piece.finish_reason:
                yield piece
                piece = Piece()

    async def whole(self) -> Piece:
        """All of it. Raises Unanswered."""
        pieces = [piece async for piece in self.pieces()]
        text = "".join(piece.text for piece in pieces)
        return Piece(text, [token for piece in pieces for token in piece.tokens], pieces[-1].finish_reason)

    def _add(self, piece: Piece, tokens: Sequence[NewToken]) -> None:
        """Tokens, up to the one that completes a stop string."""
        before = len(self.prompt.text) if self.prompt.is_echoed else 0
        for new in tokens:
            self.num_tokens += 1
            offset = before + self._stream.length
            piece.tokens.append(PlacedToken(new.token, offset, new.probability, new.experts_LK))
            piece.finish_reason = new.finish_reason
            if new.finish_reason != "end":
                piece.text += self._stream.push(new.token)
            if new.finish_reason is not None:
                piece.text += self._stream.finish()
            if self._stream.stopped:
                piece.finish_reason = "stop"
                self.submission.stop()
                return

    def _prompt_piece(self) -> Piece:
        """The prompt with its tokens, and their probabilities if they were asked for."""
        prompt, sequence = self.prompt, self.submission.sequence
        assert sequence is not None, "tokens came"
        known = sequence.prompt_probabilities if sequence.wants.prompt else [None] * len(prompt.ids)
        placed = zip(prompt.ids, prompt.offsets, known, strict=False)  # of an empty prompt EOS is known
        return Piece(prompt.text, [PlacedToken(token, offset, value, None) for token, offset, value in placed])


def offsets_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where in the text of these tokens each begins, in characters."""
    stream, offsets = TextStream(tokenizer, [], ()), []
    for token in ids:
        offsets.append(stream.length)
        stream.push(token)
    return offsets
