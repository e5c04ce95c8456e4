"""Continuous batching: requests from asyncio loops, and the one thread that decodes them.

Resources have one manager each. The waiting requests and who runs are the Scheduler's, behind its lock. Slots and the
cache are the Decoder's, which only the scheduler's thread calls. What a client has not read yet is its Submission's, in
the client's loop. Nothing here waits for a client.
"""

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from p828.inference.decode.decoder import Decoder, not_finite
from p828.inference.decode.sequence import DecodedSequence, FinishReason, NewToken
from p828.serve.scheduling.errors import Closing, DecoderFailed, QueueFull, Unanswered
from p828.serve.scheduling.limits import Limits
from p828.serve.scheduling.metrics import Metrics, Outcome
from p828.serve.scheduling.rate import RequestRate
from p828.serve.scheduling.submission import Request, Submission
from p828.system.device import is_out_of_memory

SWITCH_SECONDS = 0.0002
"""After which a thread that runs Python hands over to one that waits to, in place of Python's 5 ms.

The decoder's thread waits so after each call that gave the interpreter up; `benchmarks/scheduling.py` says what for.
"""
STUCK_SECONDS = 1.5
"""How long after the grace `close` waits for a step that does not end."""
OUTCOMES: dict[FinishReason, Outcome] = {
    "end": "stop", "stop": "stop", "length": "length", "context": "length", "diverged": "error"
}  # fmt: skip

Delivery = tuple[Submission, list[NewToken], Unanswered | None]


class Scheduler:
    """Answers requests by a Decoder, `Limits.max_running` of them at a time, first come first served.

    A request waits until a slot is free; between two steps of the decoder, who waits is admitted and who is cancelled
    leaves. Tokens reach their submissions once a step.
    """

    def __init__(self, decoder: Decoder, limits: Limits, metrics: Metrics) -> None:
        """`decoder` is idle, and from `start` to the end of `close` nobody else's.

        Raises ValueError where it has fewer slots than requests may run.
        """
        if decoder.free_slots < limits.max_running:
            raise ValueError(f"{limits.max_running} requests may run, in {decoder.free_slots} slots")
        self.failure: Exception | None = None
        """What ended the decoder for good, if anything did: the server has to be started again."""
        self._decoder, self._limits, self._metrics = decoder, limits, metrics
        self._slots, self._usual_switch_seconds = decoder.free_slots, sys.getswitchinterval()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._lock = threading.Condition()
        """Of what follows. The thread holds it between steps only, for as long as it takes to move requests."""
        self._waiting: deque[Submission] = deque()
        self._entering: Submission | None = None
        """The one that is being admitted."""
        self._running: dict[DecodedSequence, Submission] = {}
        self._given_up: list[DecodedSequence] = []
        """Those in a slot that nobody wants any more."""
        self._rate = RequestRate()
        self._finish_by: float | None = None
        """When the grace of `close` is over."""
        self._is_idle = True
        """Whether the thread calls nothing of the decoder."""

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its continuation may have; a prompt has fewer."""
        return self._decoder.max_length

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def start(self) -> None:
        """Start the thread. Until the end of `close`, all of the process switches threads after `SWITCH_SECONDS`."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def submit(self, request: Request) -> Submission:
        """Queue a request; called in an asyncio loop, which gets its tokens. Never waits. Raises as `submit_all`."""
        (submission,) = self.submit_all([request])
        return submission

    def submit_all(self, requests: Sequence[Request]) -> list[Submission]:
        """Queue all of them or none, as `submit` does.

        Raises QueueFull; Closing; DecoderFailed where the decoder is of no more use; ValueError for a prompt that is
        too long.
        """
        for request in requests:
            if len(request.prompt) >= self.max_length:
                raise ValueError(f"a prompt of {len(request.prompt)} tokens, in slots of {self.max_length}")
        with self._lock:
            if self.failure is not None:
                raise DecoderFailed(self.failure, can_go_on=False)
            if self._finish_by is not None:
                raise Closing
            free = self._limits.max_running - len(self._running)  # as many of those who wait do so for a moment only
            if len(self._waiting) + len(requests) > self._limits.max_waiting + free:
                raise QueueFull(len(self._waiting), len(requests), self._retry_after())
            submissions = [self._submission(request) for request in requests]
            self._waiting += submissions
            self._measure()
            self._lock.notify_all()
        return submissions

    def _submission(self, request: Request) -> Submission:
        metrics = self._metrics.request(request.config.max_new_tokens)
        return Submission(request, self._limits.max_seconds, metrics, self._give_up)

    def close(self, grace_seconds: float) -> None:
        """Refuse what comes, answer what was accepted, and after the grace end with Closing what is not done.

        Waits for this, and so is called in another thread than a loop's (`asyncio.to_thread`). May be called once more
        while it waits, with a shorter grace.
        """
        finish_by = time.monotonic() + grace_seconds
        with self._lock:
            self._finish_by = min(finish_by, self._finish_by or finish_by)
            self._lock.notify_all()
        if self._thread.ident is not None:  # it was started
            self._thread.join(grace_seconds + STUCK_SECONDS)
            sys.setswitchinterval(self._usual_switch_seconds)
        with self._lock:  # nobody is left, unless there is no thread or it is stuck in a step
            self._end(self._all(), Closing, "abort")

    def check_idle(self) -> None:
        """Assert what holds when no request is there: none waits or runs, and all slots are free."""
        with self._lock:
            assert self._is_idle, "the decoder's thread is at work"
            assert not [*self._all(), *self._given_up], "a request was forgotten"
            assert self._decoder.free_slots == self._slots, "a slot is taken, and nobody's"
            self._decoder.check_idle()

    def _run(self) -> None:
        while self.failure is None:
            try:
                if not self._prepare():
                    return
                self._deliver(self._decoder.step())
            except Exception as error:
                self._fail(error)

    def _prepare(self) -> bool:
        """Between two steps: who is given up leaves, who waits is admitted. Waits for a request; False at the end."""
        while True:
            with self._lock:
                self._is_idle = False
                if self._finish_by is not None and time.monotonic() >= self._finish_by:
                    self._end(self._all(), Closing, "abort")
            self._free_slots()
            self._admit()
            with self._lock:
                self._measure()
                if self._running:
                    return True
                if self._waiting or self._given_up:  # since then
                    continue
                self._rate.restart()
                self._is_idle = True
                self.check_idle()
                if self._finish_by is not None:
                    return False
                self._lock.wait()

    def _free_slots(self) -> None:
        with self._lock:
            given_up, self._given_up = self._given_up, []
        for sequence in given_up:
            if sequence.finish_reason is None:  # else it ended in the step during which it was given up
                self._decoder.cancel(sequence)

    def _admit(self) -> None:
        while self._decoder.free_slots:
            with self._lock:
                if not self._waiting or len(self._running) >= self._limits.max_running:
                    return
                submission = self._entering = self._waiting.popleft()
            request = submission.request
            try:  # without the lock, as this may wait for the device
                sequence = self._decoder.admit(
                    request.prompt, request.config, request.seed, request.end_ids, request.wants
                )
            except ValueError as error:  # of this prompt, which the others need not suffer from
                self._end([submission], partial(DecoderFailed, error, True), "error")
                continue
            with self._lock:
                submission.sequence = sequence
                if self._entering is submission:
                    self._running[sequence] = submission
                    submission.metrics.admit()
                else:
                    self._given_up.append(sequence)
                self._entering = None

    def _deliver(self, tokens: list[NewToken]) -> None:
        """Send each submission its tokens of a step, and an error if its sequence diverged, which is its own affair."""
        now = time.monotonic()
        arrived: dict[Submission, list[NewToken]] = {}
        diverged: list[Submission] = []
        self._metrics.generation_tokens.inc(sum(token.finish_reason != "diverged" for token in tokens))
        with self._lock:
            for token in tokens:
                submission = self._running.get(token.sequence)
                if submission is None:  # it was given up during the step
                    continue
                if token.finish_reason == "diverged":
                    diverged.append(submission)
                else:
                    arrived.setdefault(submission, []).append(token)
                    submission.metrics.token(now, len(submission.request.prompt))
                if token.finish_reason is not None:
                    del self._running[token.sequence]
                    self._rate.count(now)
                    submission.metrics.end(OUTCOMES[token.finish_reason])
        self._post([(submission, its_tokens, None) for submission, its_tokens in arrived.items()])
        for submission in diverged:
            error = not_finite()
            traceback.print_exception(error)
            self._post([(submission, [], DecoderFailed(error, can_go_on=True))])

    def _fail(self, error: Exception) -> None:
        """Answer those who ran with an error of the decoder; where it is of no more use, those who wait too."""
        passes = is_out_of_memory(error)
        traceback.print_exception(error, limit=0 if passes else None)
        traceback.clear_frames(error.__traceback__)  # whose tensors may be the memory that the next step needs
        with self._lock:
            can_go_on = passes and self._empty_decoder()
            self.failure = None if can_go_on else error
            ended = self._in_decoder() if can_go_on else self._all()
            self._end(ended, partial(DecoderFailed, error, can_go_on), "error")

    def _empty_decoder(self) -> bool:
        """Cancel what runs after an error; whether the decoder is whole then."""
        try:
            for sequence in self._decoder.running:
                self._decoder.cancel(sequence)
            self._decoder.check_idle()
        except Exception as error:
            traceback.print_exception(error)
            return False
        return True

    def _all(self) -> list[Submission]:
        return [*self._in_decoder(), *self._waiting]

    def _in_decoder(self) -> list[Submission]:
        return [*self._running.values(), *([] if self._entering is None else [self._entering])]

    def _end(self, submissions: list[Submission], error: Callable[[], Unanswered], outcome: Outcome) -> None:
        """Each gets an error of its own, as raising one writes into it."""
        for submission in submissions:
            self._give_up(submission, outcome)
        self._post([(submission, [], error()) for submission in submissions])

    def _give_up(self, submission: Submission, outcome: Outcome) -> None:
        """Take a request out, from any thread; nothing, where its last token has been made."""
        with self._lock:
            if submission in self._waiting:
                self._waiting.remove(submission)
            elif submission is self._entering:
                self._entering = None
            elif submission.sequence is not None and self._running.pop(submission.sequence, None) is not None:
                self._given_up.append(submission.sequence)
                self._rate.count(time.monotonic())
            else:
                return
            submission.metrics.end(outcome)
            self._measure()
            self._lock.notify_all()

    def _post(self, deliveries: Iterable[Delivery]) -> None:
        """To each loop, in one call, what its submissions get."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for delivery in deliveries:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        for loop, its_deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_receive, its_deliveries)
            except RuntimeError:  # the loop is closed, and nobody reads its submissions any more
                for submission, _, _ in its_deliveries:
                    self._give_up(submission, "abort")

    def _measure(self) -> None:
        used = sum(len(sequence.ids) for sequence in self._running)
        self._metrics.running.set(len(self._running))
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.cache_usage.set(used / (self._slots * self.max_length))

    def _retry_after(self) -> float:
        """Seconds in which those who wait now are admitted, if requests leave their slots at the rate of the last."""
        seconds = self._rate.seconds_for(len(self._waiting), time.monotonic())
        return max(1.0, min(seconds or 1.0, self._limits.max_seconds))


def _receive(deliveries: list[Delivery]) -> None:
    """In the loop of these submissions."""
    for submission, tokens, error in deliveries:
        submission.receive(tokens, error)
