"""Requests of many clients over one decoder: each gets what it would get alone, or is told why not."""

import asyncio
import random
import threading
from typing import Any

import pytest
import torch
from scheduled import (
    EOS,
    VOCABULARY,
    HeldDecoder,
    alone,
    answer,
    answers,
    decoder,
    in_one_loop,
    likeliest,
    model,
    request,
    samples,
    scheduling,
)

from p828.errors import ConfigError
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence, NewToken, Wants
from p828.serve.http.refusal import refusal_of
from p828.serve.scheduling.errors import QueueFull, TimedOut
from p828.serve.scheduling.limits import Limits
from p828.serve.scheduling.metrics import Metrics
from p828.serve.scheduling.rate import RequestRate
from p828.serve.scheduling.scheduler import Scheduler
from p828.serve.scheduling.submission import Request, Submission


def mixed_requests(count: int) -> list[Request]:
    """Prompts of 1 to 40 tokens, answers of 1 to 24."""
    chosen = random.Random(0)
    return [
        request(*[chosen.randrange(96) for _ in range(chosen.randint(1, 40))], tokens=chosen.randint(1, 24))
        for _ in range(count)
    ]


def test_64_at_once_get_what_each_gets_alone() -> None:
    requests = mixed_requests(64)
    with scheduling(decoder()) as scheduler:
        got = in_one_loop(scheduler, *requests)
    assert got == [likeliest(one.prompt, one.config.max_new_tokens) for one in requests]


def test_drawn_answers_depend_on_the_seed_alone() -> None:
    requests = [request(5, 6, tokens=12, seed=seed, temperature=1.0) for seed in range(12)]
    with scheduling(decoder()) as scheduler:
        got = in_one_loop(scheduler, *requests)
    assert got == [alone(one) for one in requests]
    assert len(set(map(tuple, got))) > 6


def test_what_is_wanted_comes_with_the_tokens() -> None:
    async def ask(scheduler: Scheduler) -> tuple[Submission, list[object]]:
        submission = scheduler.submit(request(1, 2, 3, tokens=2, wants=Wants(probability=True, prompt=True)))
        return submission, [new.probability async for tokens in submission for new in tokens]

    with scheduling(decoder()) as scheduler:
        submission, probabilities = asyncio.run(ask(scheduler))
    assert len(probabilities) == 2
    assert None not in probabilities
    assert submission.sequence is not None
    assert len(submission.sequence.prompt_probabilities) == 3


def test_first_come_first_served() -> None:
    """With one slot, answers end in the order of the requests."""
    ended: list[int] = []

    async def one(scheduler: Scheduler, number: int) -> None:
        await answer(scheduler.submit(request(number + 1, tokens=1 + number % 3)))
        ended.append(number)

    async def all_of(scheduler: Scheduler) -> None:
        await asyncio.gather(*[one(scheduler, number) for number in range(12)])

    with scheduling(decoder(slots=1)) as scheduler:
        asyncio.run(all_of(scheduler))
    assert ended == list(range(12))


def test_fewer_may_run_than_there_are_slots() -> None:
    one = HeldDecoder(slots=8)
    one.may_go_on.set()
    with scheduling(one, max_running=2) as scheduler:
        assert in_one_loop(scheduler, *[request(number) for number in range(5)]) == [
            likeliest((number,), 6) for number in range(5)
        ]
    assert one.most_running == 2


def test_a_cancelled_request_leaves_queue_or_slot() -> None:
    one = HeldDecoder(slots=1)

    async def ask(scheduler: Scheduler) -> list[list[int]]:
        running, waiting, last = (scheduler.submit(request(number, tokens=40)) for number in (1, 2, 3))
        await asyncio.to_thread(one.is_in_step.wait, 60)
        assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
        waiting.cancel()
        assert scheduler.num_waiting == 1
        running.cancel()
        running.cancel()  # changes nothing
        assert scheduler.num_running == 0
        one.may_go_on.set()
        return await asyncio.gather(*map(answer, (running, waiting, last)))

    with scheduling(one) as scheduler:
        assert asyncio.run(ask(scheduler)) == [[], [], likeliest((3,), 40)]


def test_a_request_may_be_cancelled_while_it_is_admitted() -> None:
    class SlowAdmission(HeldDecoder):
        is_admitting = threading.Event()

        def admit(self, *args: Any) -> DecodedSequence:
            self.is_admitting.set()
            assert self.may_go_on.wait(60)
            return super().admit(*args)

    one = SlowAdmission(slots=1)

    async def ask(scheduler: Scheduler) -> list[list[int]]:
        submissions = [scheduler.submit(request(number)) for number in range(2)]
        await asyncio.to_thread(one.is_admitting.wait, 60)
        submissions[0].cancel()
        one.may_go_on.set()
        return await asyncio.gather(*map(answer, submissions))

    with scheduling(one) as scheduler:
        assert asyncio.run(ask(scheduler)) == [[], likeliest((1,), 6)]


def test_a_client_that_goes_while_it_reads_frees_its_slot() -> None:
    """As a web server has it: the task that reads is cancelled."""

    async def read(scheduler: Scheduler, has_begun: asyncio.Event) -> None:
        with scheduler.submit(request(1, tokens=60)) as submission:
            async for _ in submission:
                has_begun.set()
                one.may_go_on.clear()

    async def ask(scheduler: Scheduler) -> list[int]:
        has_begun = asyncio.Event()
        one.may_go_on.set()
        task = asyncio.create_task(read(scheduler, has_begun))
        await has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scheduler.num_running == 0
        one.may_go_on.set()
        return await answer(scheduler.submit(request(2)))

    one = HeldDecoder(slots=1)
    with scheduling(one) as scheduler:
        assert asyncio.run(ask(scheduler)) == likeliest((2,), 6)


def test_no_token_comes_after_a_cancel() -> None:
    """Neither one that was on its way into the loop, nor one that had come and was not read."""

    async def ask(scheduler: Scheduler) -> list[list[int]]:
        on_the_way, unread, read = (scheduler.submit(request(number)) for number in range(3))
        scheduler.close(60)  # meanwhile this loop receives nothing
        on_the_way.cancel()
        assert not unread.has_ended
        await asyncio.sleep(0)
        assert unread.has_ended
        unread.cancel()
        return [await answer(submission) for submission in (on_the_way, unread, read)]

    with scheduling(decoder()) as scheduler:
        assert asyncio.run(ask(scheduler)) == [[], [], likeliest((2,), 6)]


def test_a_stop_string_ends_a_whole_answer() -> None:
    async def ask(scheduler: Scheduler) -> int:
        count = 0
        with scheduler.submit(request(1, tokens=60)) as submission:
            async for tokens in submission:
                count += len(tokens)
                submission.stop()
        return count

    metrics = Metrics("mine", 64)
    with scheduling(decoder(), metrics) as scheduler:
        assert 1 <= asyncio.run(ask(scheduler)) < 60
    assert samples(metrics)["vllm:request_success_total", "stop"] == 1


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    one = HeldDecoder(slots=2)

    async def ask(scheduler: Scheduler) -> list[list[int]]:
        submissions = [scheduler.submit(request(0))]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        submissions += [scheduler.submit(request(number)) for number in range(1, 5)]  # one slot is free, three may wait
        with pytest.raises(QueueFull, match=r"4 requests wait already; try again in 1 second$") as refusal:
            scheduler.submit(request(9))
        assert refusal.value.retry_after_seconds == 1.0  # no rate is known yet
        submissions[2].cancel()
        submissions.append(scheduler.submit(request(5)))
        one.may_go_on.set()
        return await asyncio.gather(*map(answer, submissions))

    with scheduling(one, max_waiting=3) as scheduler:
        likely = [likeliest((number,), 6) for number in range(6)]
        assert asyncio.run(ask(scheduler)) == [*likely[:2], [], *likely[3:]]


def test_a_refusal_and_its_header_name_the_same_seconds() -> None:
    error = QueueFull(waiting=1, asked=1, retry_after_seconds=1.2)
    assert str(error) == "1 request waits already; try again in 2 seconds"
    assert refusal_of(error).headers == {"retry-after": "2"}


def test_several_requests_are_queued_together_or_not_at_all() -> None:
    one = HeldDecoder(slots=1)
    metrics = Metrics("mine", 64)

    async def ask(scheduler: Scheduler) -> list[list[int]]:
        submissions = [scheduler.submit(request(0))]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        with pytest.raises(QueueFull, match=r"^0 requests wait already, and there is no room for 3 more"):
            scheduler.submit_all([request(number) for number in range(1, 4)])
        with pytest.raises(ValueError, match="a prompt of 64 tokens"):
            scheduler.submit_all([request(1), request(*[1] * 64)])
        assert scheduler.num_waiting == 0
        submissions += scheduler.submit_all([request(1), request(2)])
        one.may_go_on.set()
        return await asyncio.gather(*map(answer, submissions))

    with scheduling(one, metrics, max_waiting=2) as scheduler:
        assert asyncio.run(ask(scheduler)) == [likeliest((number,), 6) for number in range(3)]
    assert samples(metrics)["vllm:request_success_total", "abort"] == 0


def test_who_is_refused_is_told_to_wait_for_a_second_at_least() -> None:
    one = HeldDecoder(slots=1)

    async def ask(scheduler: Scheduler) -> None:
        submission = scheduler.submit(request(0))
        with pytest.raises(QueueFull, match=r"try again in 1 second$") as refusal:
            scheduler.submit_all([request(1), request(2)])
        assert refusal.value.retry_after_seconds == 1.0
        submission.cancel()
        one.may_go_on.set()

    with scheduling(one, max_waiting=0, max_seconds=0.3) as scheduler:
        asyncio.run(ask(scheduler))


def test_a_full_queue_tells_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    class SlowDecoder(Decoder):
        """A step reads one prompt and gives one token, which takes 5 seconds of the clock. The fifth is held."""

        steps = 0
        is_in_fifth, may_go_on = threading.Event(), threading.Event()

        def step(self) -> list[NewToken]:
            if self.steps == 4:
                self.is_in_fifth.set()
                assert self.may_go_on.wait(60)
            self.steps += 1
            clock.now += 5.0
            return super().step()

    async def ask(scheduler: Scheduler) -> float:
        submissions = [scheduler.submit(request(number, tokens=1)) for number in range(7)]
        await asyncio.to_thread(one.is_in_fifth.wait, 60)
        submissions += [scheduler.submit(request(number, tokens=1)) for number in range(4)]
        with pytest.raises(QueueFull, match="6 requests wait already; try again in 30 seconds") as refusal:
            scheduler.submit(request(9))
        one.may_go_on.set()
        await asyncio.gather(*map(answer, submissions))
        return refusal.value.retry_after_seconds

    clock = Clock()
    monkeypatch.setattr("p828.serve.scheduling.scheduler.time", clock)
    one = SlowDecoder(model(), VOCABULARY, EOS, torch.float32, slots=1)
    with scheduling(one, max_waiting=6) as scheduler:
        assert asyncio.run(ask(scheduler)) == 30.0
    assert scheduler._rate.seconds_for(1, clock.now) is None  # it was idle since


def test_the_rate_is_that_of_the_last_requests() -> None:
    rate = RequestRate()
    assert rate.seconds_for(10, now=0.0) is None
    for second in range(100):
        rate.count(second * 1000.0)
    for second in range(64):
        rate.count(200_000.0 + second / 2)
    assert rate.seconds_for(10, now=200_031.5) == pytest.approx(5.0)
    assert rate.seconds_for(10, now=200_063.0) == pytest.approx(10.0)  # none of late: it is slower now
    rate.restart()
    assert rate.seconds_for(10, now=200_064.0) is None


def test_requests_time_out_though_the_decoder_is_stuck() -> None:
    """Running or waiting; those who do not read are taken out as well."""
    one = HeldDecoder(slots=1)

    async def ask(scheduler: Scheduler) -> None:
        for submission in [scheduler.submit(request(number)) for number in range(3)]:
            with pytest.raises(TimedOut, match=r"longer than 0\.2 seconds"):
                await answer(submission)
            assert submission.has_ended
        assert scheduler.num_running == scheduler.num_waiting == 0
        one.may_go_on.set()

    with scheduling(one, max_seconds=0.2) as scheduler:
        asyncio.run(ask(scheduler))


def test_a_client_that_does_not_read_keeps_nobody_waiting() -> None:
    """Its tokens wait for it, no more than it asked for, and come in one list."""

    async def ask(scheduler: Scheduler) -> list[list[int]]:
        stuck = scheduler.submit(request(1, tokens=60))
        others = await answers(scheduler, [request(number, tokens=30) for number in range(6)])
        while not stuck.has_ended:
            await answers(scheduler, [request(3)])
        lists = [[new.token for new in tokens] async for tokens in stuck]
        assert lists == [likeliest((1,), 60)]
        return others

    with scheduling(decoder(slots=2)) as scheduler:
        assert asyncio.run(ask(scheduler)) == [likeliest((number,), 30) for number in range(6)]


def test_a_loop_that_ends_takes_its_requests_with_it() -> None:
    one = HeldDecoder(slots=1)

    async def leave(scheduler: Scheduler) -> None:
        for number in range(3):
            scheduler.submit(request(number, tokens=60))
        await asyncio.to_thread(one.is_in_step.wait, 60)

    metrics = Metrics("mine", 64)
    with scheduling(one, metrics) as scheduler:
        asyncio.run(leave(scheduler))
        one.may_go_on.set()
        assert in_one_loop(scheduler, request(5)) == [likeliest((5,), 6)]
    assert samples(metrics)["vllm:request_success_total", "abort"] == 3


def test_loops_of_several_threads_share_a_scheduler() -> None:
    got: dict[int, list[list[int]]] = {}

    def ask(number: int) -> None:
        got[number] = in_one_loop(scheduler, *[request(number, other) for other in range(6)])

    with scheduling(decoder()) as scheduler:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {number: [likeliest((number, other), 6) for other in range(6)] for number in range(4)}


def test_a_prompt_that_has_no_room_is_refused_at_once() -> None:
    async def ask(scheduler: Scheduler) -> list[int]:
        with pytest.raises(ValueError, match="64 tokens, in slots of 64"):
            scheduler.submit(request(*[1] * 64))
        return await answer(scheduler.submit(request(*[1] * 63)))

    with scheduling(decoder()) as scheduler:
        assert asyncio.run(ask(scheduler)) == likeliest((1,) * 63, 6)


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="9 requests may run, in 8 slots"):
        Scheduler(decoder(slots=8), Limits(max_running=9), Metrics("mine", 64))
    for given in ({"max_running": 0}, {"max_waiting": -1}, {"max_seconds": 0.0}, {"max_seconds": float("inf")}):
        (name,) = given
        with pytest.raises(ConfigError, match=f"{name} = .*is accepted"):
            Limits(**given)


def test_the_tiny_model_ends_some_answers_itself() -> None:
    """So that what is asked of 64 requests above includes those."""
    ends = [likeliest(one.prompt, one.config.max_new_tokens) for one in mixed_requests(64)]
    assert model().config.max_position_embeddings == 64
    assert any(len(ids) < one.config.max_new_tokens for ids, one in zip(ends, mixed_requests(64), strict=True))
