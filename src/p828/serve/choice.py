"""One answer: from the tokens of a submission to pieces of text, each with its tokens."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.decode.sequence import FinishReason, TokenProbability
from p828.inference.generate import TextStream
from p828.serve.submission import Submission


class Prompt(NamedTuple):
    text: str
    """What was asked, from which the seed follows. Of token ids their text."""
    ids: Sequence[int]
    end_ids: Sequence[int] = ()
    """Tokens that end an answer, beside EOS."""
    offsets: Sequence[int] = ()
    """Where in the text each token begins, in characters, if that is wanted."""
    echoed: int = 0
    """Characters of the prompt that the answer's text begins with."""


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
        piece = Piece()
        async for tokens in self.submission:
            for new in tokens:
                self.num_tokens += 1
                offset = self.prompt.echoed + self._stream.length
                piece.tokens.append(PlacedToken(new.token, offset, new.probability, new.experts_LK))
                piece.finish_reason = new.finish_reason
                if new.finish_reason != "end":
                    piece.text += self._stream.push(new.token)
                if new.finish_reason is not None:
                    piece.text += self._stream.finish()
                if self._stream.stopped:
                    piece.finish_reason = "stop"
                    self.submission.stop()
                    break
            if piece.text or piece.finish_reason:
                yield piece
                piece = Piece()

    def prompt_piece(self) -> Piece:
        """The prompt as the beginning of the text, with its tokens' probabilities if they were asked for."""
        prompt, sequence = self.prompt, self.submission.sequence
        known = (
            sequence.prompt_probabilities
            if sequence is not None and sequence.wants.prompt
            else [None] * len(prompt.ids)
        )
        placed = zip(prompt.ids, prompt.offsets, known, strict=False)  # of an empty prompt EOS is known
        tokens = [PlacedToken(token, offset, probability, None) for token, offset, probability in placed]
        return Piece(self.prompt.text, tokens)


def joined(pieces: Sequence[Piece]) -> Piece:
    """All of a choice's."""
    text = "".join(piece.text for piece in pieces)
    return Piece(text, [token for piece in pieces for token in piece.tokens], pieces[-1].finish_reason)


def offsets_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where in the text of these tokens each begins, in characters."""
    stream, offsets = TextStream(tokenizer, [], ()), []
    for token in ids:
        offsets.append(stream.length)
        stream.push(token)
    return offsets
