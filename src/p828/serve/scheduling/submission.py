"""A request, and what the one who submitted it gets of it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from p828.inference.decode.sequence import DecodedSequence, NewToken, Wants
from p828.inference.sampling_config import SamplingConfig
from p828.serve.scheduling.errors import TimedOut, Unanswered
from p828.serve.scheduling.metrics import Outcome, RequestMetrics


@dataclass(frozen=True)
class Request:
    """Token ids to continue. `config.stop` is not looked at here: strings are found in the text, by the caller."""

    prompt: tuple[int, ...]
    config: SamplingConfig
    seed: int
    end_ids: frozenset[int]
    wants: Wants


class Submission:
    """A request that a scheduler accepted: an async iterator of lists of tokens, in the asyncio loop that submitted it.

    Each list has all tokens that came since the one before, and at least one: a reader that falls behind gets longer
    lists, and keeps nobody waiting. The last token has a `finish_reason`, and the iteration ends after it. Iterating
    raises TimedOut, Closing or DecoderFailed, once the tokens that came before were given. It is for one task.

        with scheduler.submit(request) as submission:  # cancels at the end what has not ended
            async for tokens in submission:
                ...
    """

    def __init__(
        self,
        request: Request,
        max_seconds: float,
        metrics: RequestMetrics,
        give_up: Callable[["Submission", Outcome], None],
    ) -> None:
        """For the running loop. `give_up` is told, in the loop, that the request ends before its answer."""
        self.request, self.metrics = request, metrics
        self.loop = asyncio.get_running_loop()
        self.sequence: DecodedSequence | None = None
        """Since the request was admitted; what belongs to the prompt is in it when the first token comes."""
        self.has_ended = False
        """Whether nothing more comes."""
        self._tokens: list[NewToken] = []
        self._error: Unanswered | None = None
        self._arrived = asyncio.Event()
        self._give_up = give_up
        self._timer = self.loop.call_later(max_seconds, self._time_out, max_seconds)

    def __aiter__(self) -> "Submission":
        return self

    async def __anext__(self) -> list[NewToken]:
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self.has_ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        tokens, self._tokens = self._tokens, []
        return tokens

    def __enter__(self) -> "Submission":
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Give the request up, as its client has gone: it leaves the queue or its slot, and the iteration ends."""
        self._leave("abort")

    def stop(self) -> None:
        """As `cancel`, but the answer is whole: its text came to a stop string."""
        self._leave("stop")

    def receive(self, tokens: list[NewToken], error: Unanswered | None = None) -> None:
        """From the scheduler, on the loop: more tokens, or what ended the request. Nothing, where it has ended."""
        if self.has_ended:
            return
        self._tokens += tokens
        self._error = error
        if error is not None or tokens[-1].finish_reason is not None:
            self._end()
        self._arrived.set()

    def _time_out(self, max_seconds: float) -> None:
        self._give_up(self, "abort")
        self.receive([], TimedOut(max_seconds))

    def _leave(self, outcome: Outcome) -> None:
        self._tokens.clear()
        if not self.has_ended:
            self._end()
            self._arrived.set()
            self._give_up(self, outcome)

    def _end(self) -> None:
        self.has_ended = True
        self._timer.cancel()
