"""How a scheduler ends, when it is asked to and when its decoder fails: everyone who waits for an answer is told."""

import asyncio
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from scheduled import (
    EOS,
    SLOTS,
    VOCABULARY,
    HeldDecoder,
    answer,
    decoder,
    in_one_loop,
    likeliest,
    request,
    scheduling,
)

from p828.errors import NotFinite
from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import DecodedSequence
from p828.serve.scheduling.errors import Closing, DecoderFailed
from p828.serve.scheduling.limits import Limits
from p828.serve.scheduling.metrics import Metrics
from p828.serve.scheduling.scheduler import SWITCH_SECONDS, Scheduler
from tiny import tiny_model


def test_closing_answers_what_was_accepted() -> None:
    one = HeldDecoder(slots=1)

    async def ask(scheduler: Scheduler) -> list[list[int]]:
        submissions = [scheduler.submit(request(number)) for number in range(3)]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close, 60))
        await until_refused(scheduler)
        one.may_go_on.set()
        got = await asyncio.gather(*map(answer, submissions))
        await closing
        return got

    with scheduling(one) as scheduler:
        assert asyncio.run(ask(scheduler)) == [likeliest((number,), 6) for number in range(3)]


def test_after_the_grace_the_rest_is_told() -> None:
    one = HeldDecoder(slots=1)

    async def ask(scheduler: Scheduler) -> None:
        submissions = [scheduler.submit(request(number)) for number in range(3)]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close, 0))
        await until_refused(scheduler)
        one.may_go_on.set()
        await closing
        for submission in submissions:
            with pytest.raises(Closing):
                await answer(submission)

    with scheduling(one) as scheduler:
        asyncio.run(ask(scheduler))


def test_a_second_close_shortens_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p828.serve.scheduling.scheduler.STUCK_SECONDS", 3600.0)
    one = HeldDecoder(slots=1)
    one.gives_nothing = True
    one.may_go_on.set()

    async def ask(scheduler: Scheduler) -> None:
        submission = scheduler.submit(request(1))
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close, 3600))
        await until_refused(scheduler)
        await asyncio.to_thread(scheduler.close, 0)
        await closing
        with pytest.raises(Closing):
            await answer(submission)

    with scheduling(one) as scheduler:
        asyncio.run(ask(scheduler))


def test_a_decoder_that_is_stuck_keeps_no_one_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p828.serve.scheduling.scheduler.STUCK_SECONDS", 0.0)
    one = HeldDecoder(slots=1)

    async def ask(scheduler: Scheduler) -> None:
        submissions = [scheduler.submit(request(number)) for number in range(3)]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        await asyncio.to_thread(scheduler.close, 0)
        for submission in submissions:
            with pytest.raises(Closing):
                await answer(submission)
        one.may_go_on.set()

    with scheduling(one) as scheduler:
        asyncio.run(ask(scheduler))


async def until_refused(scheduler: Scheduler) -> None:
    while True:
        try:
            scheduler.submit(request(1)).cancel()
        except Closing:
            return
        await asyncio.sleep(0)


def test_threads_switch_sooner_while_it_is_at_work() -> None:
    usual = sys.getswitchinterval()
    with scheduling(decoder()):
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    assert sys.getswitchinterval() == usual


def test_a_scheduler_that_was_not_started_closes() -> None:
    async def ask(scheduler: Scheduler) -> None:
        submission = scheduler.submit(request(1))
        scheduler.close(0)
        with pytest.raises(Closing):
            await answer(submission)

    asyncio.run(ask(Scheduler(decoder(), Limits(SLOTS), Metrics("mine", 64))))


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("error", [out_of_memory, MemoryError])
def test_an_error_that_passes_ends_those_who_ran(error: Callable[[], Exception]) -> None:
    one = HeldDecoder(slots=2)
    one.errors.append(error())

    async def ask(scheduler: Scheduler) -> list[list[int] | Exception]:
        first = [asyncio.create_task(answer(scheduler.submit(request(number)))) for number in range(2)]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        while scheduler.num_running + scheduler.num_waiting < 2:
            await asyncio.sleep(0)
        first += [asyncio.create_task(answer(scheduler.submit(request(number)))) for number in range(2, 4)]
        await asyncio.sleep(0)
        one.may_go_on.set()
        return await asyncio.gather(*first, return_exceptions=True)

    with scheduling(one) as scheduler:
        got = asyncio.run(ask(scheduler))
        assert scheduler.failure is None
        assert in_one_loop(scheduler, request(7)) == [likeliest((7,), 6)]
    failed = [one for one in got if isinstance(one, DecoderFailed)]
    assert 1 <= len(failed) <= 2
    assert all(one.can_go_on for one in failed)
    assert got[len(failed) :] == [likeliest((number,), 6) for number in range(len(failed), 4)]


def test_an_error_of_an_admission_is_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that has numbers of no token, and one for which there is no memory; the others are answered."""
    one = HeldDecoder(slots=2)
    begin = one._rows.begin

    def begin_with_little_memory(sequence: DecodedSequence, prompt: Sequence[int]) -> None:
        if 90 in prompt:
            raise MemoryError
        begin(sequence, prompt)

    async def ask(scheduler: Scheduler) -> list[list[int] | BaseException]:
        requests = [request(1), request(VOCABULARY), request(2), request(-1), request(3)]
        got = await asyncio.gather(*[answer(scheduler.submit(one)) for one in requests], return_exceptions=True)
        got += await asyncio.gather(answer(scheduler.submit(request(90))), return_exceptions=True)
        return [*got, await answer(scheduler.submit(request(4)))]

    monkeypatch.setattr(one._rows, "begin", begin_with_little_memory)
    one.may_go_on.set()
    with scheduling(one) as scheduler:
        got = asyncio.run(ask(scheduler))
    assert got[::2] == [likeliest((number,), 6) for number in range(1, 5)]
    assert all(isinstance(failed, DecoderFailed) and failed.can_go_on for failed in got[1::2])
    assert "token ids from 0 to 96 are accepted" in str(got[1])
    assert "MemoryError" in str(got[5])


def test_a_model_that_diverged_answers_each_request_with_that() -> None:
    diverged = tiny_model()
    with torch.no_grad():
        diverged.head_weight.fill_(float("nan"))

    async def ask(scheduler: Scheduler) -> DecoderFailed:
        with pytest.raises(DecoderFailed, match="its weights diverged") as failure:
            await answer(scheduler.submit(request(1)))
        return failure.value

    with scheduling(Decoder(diverged, VOCABULARY, EOS, torch.float32, SLOTS)) as scheduler:
        for _ in range(2):
            failure = asyncio.run(ask(scheduler))
            assert failure.can_go_on
            assert isinstance(failure.__cause__, NotFinite)


def test_a_request_that_diverges_ends_alone() -> None:
    """The others' answers are those that they get alone, and nobody meets its numbers in its slot."""
    model, nan_token = tiny_model(), 5
    with torch.no_grad():
        model.model.embed_tokens.weight[nan_token] = float("nan")
    sound = [one for one in range(20) if nan_token not in (one, *likeliest((one,), 6))]

    async def ask(scheduler: Scheduler, numbers: list[int]) -> list[list[int] | BaseException]:
        return await asyncio.gather(*[answer(scheduler.submit(request(n))) for n in numbers], return_exceptions=True)

    one = Decoder(model, VOCABULARY, EOS, torch.float32, SLOTS)
    with scheduling(one) as scheduler:
        alone = [asyncio.run(ask(scheduler, [number]))[0] for number in sound]
        mixed = [number for pair in zip(sound, [nan_token] * len(sound), strict=True) for number in pair]
        got = asyncio.run(ask(scheduler, mixed))
    assert got[::2] == alone == [likeliest((number,), 6) for number in sound]
    for failed in got[1::2]:
        assert isinstance(failed, DecoderFailed)
        assert isinstance(failed.__cause__, NotFinite)
        assert failed.can_go_on


def test_an_error_that_leaves_a_decoder_broken_ends_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    one = HeldDecoder(slots=1)
    one.errors.append(MemoryError())

    async def ask(scheduler: Scheduler) -> None:
        submissions = [scheduler.submit(request(number)) for number in range(2)]
        await asyncio.to_thread(one.is_in_step.wait, 60)
        monkeypatch.setattr(one, "cancel", lambda sequence: None)  # so that a slot stays taken
        one.may_go_on.set()
        for submission in submissions:
            with pytest.raises(DecoderFailed, match="MemoryError"):
                await answer(submission)

    scheduler = Scheduler(one, Limits(max_running=1), Metrics("mine", 64))
    scheduler.start()
    asyncio.run(ask(scheduler))
    assert isinstance(scheduler.failure, MemoryError)
    scheduler.close(60)


def test_an_unknown_error_ends_the_scheduler(capfd: pytest.CaptureFixture[str]) -> None:
    one = HeldDecoder(slots=1)
    one.errors.append(RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it"))
    scheduler = Scheduler(one, Limits(max_running=1), Metrics("mine", 64))
    scheduler.start()

    async def ask() -> None:
        submissions = [scheduler.submit(request(number)) for number in range(3)]
        one.may_go_on.set()
        for submission in submissions:
            with pytest.raises(DecoderFailed, match="RuntimeError: CUDA error: an illegal memory access was enc") as it:
                await answer(submission)
            assert not it.value.can_go_on
        with pytest.raises(DecoderFailed):
            scheduler.submit(request(1))

    asyncio.run(ask())
    assert isinstance(scheduler.failure, RuntimeError)
    scheduler.close(60)
    assert "more of it" in capfd.readouterr().err  # the traceback
