"""`p828 generate --interactive`: what is typed is continued, or answered as one conversation."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from types import FrameType

from p828.cli.generation.asking import Asking
from p828.cli.generation.expert_record import ExpertRecord
from p828.cli.generation.speed import Speed
from p828.cli.output import show
from p828.data.tokenizer.chat_template import Messages
from p828.errors import ConfigError, DataError, warn
from p828.inference.decode.decoder import Decoder
from p828.inference.generate import Piece, Prompt
from p828.inference.prompts import GivenPrompt

A_LONG_STEP = 2.0  # seconds


class Interrupts:
    """Ctrl-C at a terminal: noted, for an answer to end between two of its tokens, and not in the middle of a step."""

    def __init__(self) -> None:
        self.first: float | None = None
        """When the first one of this answer came, by the monotonic clock, in seconds."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """In the block they are noted. One that comes long after another is raised: the answer does not end."""
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is not None and now - self.first > A_LONG_STEP:
            raise KeyboardInterrupt
        self.first = self.first or now


class Conversation:
    """One line after another. Without chat, each is a text of its own."""

    def __init__(self, asking: Asking, decoder: Decoder) -> None:
        self._asking, self._decoder = asking, decoder
        self._history: Messages = []
        self._experts = ExpertRecord(asking.loaded, keeps_tokens=True) if asking.wants_experts else None
        self.speed = Speed()
        """Of all answers."""
        self.status = ""
        """How full the context is with the last answer, and its speed, in a few words."""

    def reply(self, line: str, interrupts: Interrupts) -> None:
        """Show what the model makes of a line, until it ends or is interrupted. Raises ConfigError and DataError."""
        messages: Messages = [*self._history, {"role": "user", "content": line}]
        fields = {"messages": messages} if self._asking.is_chat else {"prompt": line}
        prompt = self._encoded(GivenPrompt(fields))
        texts: list[str] = []
        speed, last = Speed(), None
        with closing(self._asking.pieces(self._decoder, [prompt])) as pieces:
            for piece in pieces:
                speed.note(piece)
                texts.append(piece.text)
                show(piece.text)
                last = piece
                if self._experts is not None:
                    self._experts.take(piece)
                if interrupts.first is not None:
                    break
        show("", end="\n")
        self._end(last)
        used = len(prompt.ids) + speed.tokens - (0 if last is None else last.token.sequence.dropped)
        context = f"context {used:,} of {self._asking.context:,}"
        self.status = ", ".join(part for part in (context, speed.rate) if part)
        self.speed += speed
        if texts:
            self._history = [*messages, {"role": "assistant", "content": "".join(texts)}]
        if self._experts is not None and last is not None:
            self._experts.end([prompt])
            self._experts.show_tokens()

    def _encoded(self, prompt: GivenPrompt) -> Prompt:
        """Raises ConfigError and DataError."""
        try:
            return self._asking.encoded(prompt)
        except ConfigError as error:
            if self._history and self._asking.is_chat:
                raise ConfigError(f"{error}; the conversation so far is part of it: Ctrl-D ends it") from None
            raise

    def _end(self, last: Piece | None) -> None:
        if last is None or last.completion is None:
            warn("stopped")
        else:
            self._asking.note(last.completion)

    def end(self) -> None:
        """Show what comes after the last line."""
        if self._experts is not None:
            self._experts.show_loads()


def converse(asking: Asking) -> None:
    """Until the end of input. At a terminal Ctrl-C stops an answer; elsewhere it ends the command, as ever."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with asking.open_decoder([asking.context]) as decoder:
        conversation = Conversation(asking, decoder)
        interrupts = Interrupts()
        with interrupts.noted() if is_terminal else nullcontext():
            for line in _typed(conversation) if is_terminal else _given_lines():
                interrupts.first = None
                try:
                    conversation.reply(line, interrupts)
                except (ConfigError, DataError) as error:
                    warn(str(error))
        conversation.end()
        if conversation.speed.tokens:
            warn(str(conversation.speed))


def _typed(conversation: Conversation) -> Iterator[str]:
    from p828.cli.generation.terminal import typed_lines  # takes a while to import, for none but this

    return typed_lines(lambda: conversation.status)


def _given_lines() -> Iterator[str]:
    """Of standard input, without their ends. Raises ConfigError for what is no text."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the input is not {error.encoding} text") from None
        if not line:
            return
        yield line.removesuffix("\n")
