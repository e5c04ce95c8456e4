"""Many requests, of clients that come and go: none is lost or mixed up, and nothing of them stays."""

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable

import psutil
import pytest
from scheduled import answer, answers, decoder, in_one_loop, likeliest, request, running_behind, scheduling

from decoded import starts_steps_at_once
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence
from p828.serve.scheduling.errors import QueueFull
from p828.serve.scheduling.scheduler import Scheduler
from p828.serve.scheduling.submission import Request, Submission

AT_A_TIME = 64


class Client:
    """One of those that ask at a time. What it does follows from its seed."""

    def __init__(self, scheduler: Scheduler, seed: int, outcomes: Counter[str]) -> None:
        self.scheduler, self.random, self.outcomes = scheduler, random.Random(seed), outcomes

    async def ask(self, requests: int) -> None:
        for _ in range(requests):
            leaves = self.random.choice(["never", "never", "never", "at once", "in a while", "after tokens"])
            self.outcomes[await self.ask_one(self.any_request(), leaves)] += 1

    def any_request(self) -> Request:
        """One of 128 kinds, so that there is time for a whole pass for each of their tokens."""
        length, start = self.random.choice([1, 2, 5, 15, 16, 17, 33, 50]), self.random.randrange(4)
        prompt = [(length * (start + number) + start) % 96 for number in range(length)]
        return request(*prompt, tokens=self.random.choice([1, 2, 7, 40]))

    async def submit(self, one: Request) -> Submission:
        while True:
            try:
                return self.scheduler.submit(one)
            except QueueFull:
                self.outcomes["refused"] += 1
                await asyncio.sleep(0.001)  # sooner than told, so that the queue stays full

    async def ask_one(self, one: Request, leaves: str) -> str:
        with await self.submit(one) as submission:
            if leaves == "at once":
                return "left"
            if leaves == "in a while":
                for _ in range(self.random.randrange(20)):
                    await asyncio.sleep(0)
                return "left"
            got: list[int] = []
            async for tokens in submission:
                got += [new.token for new in tokens]
                if leaves == "after tokens" and len(got) >= 3:
                    break
            right = likeliest(one.prompt, one.config.max_new_tokens)
            assert got == right[: len(got)]
            if leaves == "never":
                assert got == right
            return "answered" if got == right else "left"


@pytest.mark.parametrize("as_on_a_gpu", [None, running_behind, starts_steps_at_once])
@pytest.mark.parametrize("requests", [128, pytest.param(1000, marks=pytest.mark.long)])
def test_none_is_lost_or_mixed_up(requests: int, as_on_a_gpu: Callable[[Decoder], Decoder] | None) -> None:
    outcomes: Counter[str] = Counter()

    async def all_clients(scheduler: Scheduler) -> None:
        shares = [requests // AT_A_TIME + (number < requests % AT_A_TIME) for number in range(AT_A_TIME)]
        clients = [Client(scheduler, number, outcomes) for number in range(AT_A_TIME)]
        await asyncio.gather(*[client.ask(share) for client, share in zip(clients, shares, strict=True)])

    one = decoder(16)
    with scheduling(one if as_on_a_gpu is None else as_on_a_gpu(one), max_waiting=32) as scheduler:
        asyncio.run(all_clients(scheduler))
    assert outcomes["answered"] + outcomes["left"] == requests
    assert outcomes["answered"] > requests / 3
    assert outcomes["left"] > requests / 5
    assert outcomes["refused"]


def test_nothing_of_a_request_stays() -> None:
    async def ask(scheduler: Scheduler) -> None:
        await answers(scheduler, [request(number) for number in range(32)])
        for number in range(32):
            scheduler.submit(request(number)).cancel()
        await answer(scheduler.submit(request(1)))

    with scheduling(decoder()) as scheduler:
        asyncio.run(ask(scheduler))
        gc.collect()
        assert not [found for found in gc.get_objects() if type(found) in (Submission, Request)]
    del scheduler
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is DecodedSequence]


@pytest.mark.long
def test_memory_is_flat_over_10_000_requests() -> None:
    """After a tenth of them, which fill the allocators' pools: then less than 100 bytes a request."""

    def ask(scheduler: Scheduler, requests: int) -> int:
        for begin in range(0, requests, 100):
            in_one_loop(scheduler, *[request(number % 96, tokens=2) for number in range(begin, begin + 100)])
        gc.collect()
        return psutil.Process().memory_info().rss

    with scheduling(decoder()) as scheduler:
        before = ask(scheduler, 1000)
        after = ask(scheduler, 9000)
    print(f"resident: {before / 2**20:.1f} MiB after 1,000 requests, {after / 2**20:.1f} after 10,000")
    assert after - before < 9000 * 100
