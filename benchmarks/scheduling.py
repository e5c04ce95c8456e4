"""How many tokens per second pass through the server's scheduler, with a decoder that takes no work from the processor.

    python benchmarks/scheduling.py [--step-ms 1.0] [--reader-us 100]

Each step sleeps, as a thread does that waits for a GPU, and gives 64 sequences a token. A reader takes some time for
each list of tokens it gets, as a web server does that writes them to a client. Printed for Python's own interval after
which threads hand over to one another, and for the scheduler's (`SWITCH_SECONDS` in serve/scheduling/scheduler.py).
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Collection, Sequence
from unittest.mock import patch

from p828.inference.decode.sequence import NOTHING_MORE, DecodedSequence, NewToken, Wants, sequence_of
from p828.inference.sampling_config import SamplingConfig
from p828.serve.scheduling.limits import Limits
from p828.serve.scheduling.metrics import Metrics
from p828.serve.scheduling.scheduler import SWITCH_SECONDS, Scheduler
from p828.serve.scheduling.submission import Request

SEQUENCES, TOKENS = 64, 1000


class SleepingDecoder:
    """As the Decoder is to a scheduler, without a model."""

    max_length = 2 * TOKENS

    def __init__(self, step_seconds: float) -> None:
        self.running: list[DecodedSequence] = []
        self._step_seconds = step_seconds

    @property
    def free_slots(self) -> int:
        return SEQUENCES - len(self.running)

    def admit(
        self, prompt: Sequence[int], config: SamplingConfig, seed: int, end_ids: Collection[int], wants: Wants
    ) -> DecodedSequence:
        sequence = sequence_of(prompt, 0, config, seed, end_ids, wants, slot=0, longest=self.max_length)
        self.running.append(sequence)
        return sequence

    def step(self) -> list[NewToken]:
        time.sleep(self._step_seconds)
        for sequence in self.running:
            sequence.ids.append(1)
            if len(sequence.continuation) == TOKENS:
                sequence.finish_reason = "length"
        tokens = [NewToken(sequence, 1, sequence.finish_reason, None, None) for sequence in self.running]
        self.running = [sequence for sequence in self.running if sequence.finish_reason is None]
        return tokens

    def check_idle(self) -> None:
        assert not self.running


def measure(step_seconds: float, reader_seconds: float, switch_seconds: float) -> tuple[float, float]:
    """Tokens per second, and tokens in a list on average."""
    lists = 0

    async def read(scheduler: Scheduler) -> None:
        nonlocal lists
        config = SamplingConfig(max_new_tokens=TOKENS)
        async for _ in scheduler.submit(Request((1,), config, 0, frozenset(), NOTHING_MORE)):
            lists += 1
            end = time.perf_counter() + reader_seconds
            while time.perf_counter() < end:
                pass
            await asyncio.sleep(0)

    async def read_all(scheduler: Scheduler) -> None:
        await asyncio.gather(*[read(scheduler) for _ in range(SEQUENCES)])

    decoder = SleepingDecoder(step_seconds)
    with patch("p828.serve.scheduling.scheduler.SWITCH_SECONDS", switch_seconds):
        scheduler = Scheduler(decoder, Limits(SEQUENCES), Metrics("none", decoder.max_length))  # type: ignore[arg-type]
        scheduler.start()
        begin = time.perf_counter()
        asyncio.run(read_all(scheduler))
        seconds = time.perf_counter() - begin
        scheduler.close(grace_seconds=10)
    return SEQUENCES * TOKENS / seconds, SEQUENCES * TOKENS / lists


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--reader-us", type=float, default=100.0)
    options = parser.parse_args()
    step, reader = options.step_ms / 1e3, options.reader_us / 1e6
    print(f"{SEQUENCES} sequences, {options.step_ms} ms a step: at most {SEQUENCES / step:,.0f} tokens/s")
    for switch in (sys.getswitchinterval(), 1e-3, SWITCH_SECONDS, 5e-5):
        for reader_seconds in (0.0, reader):
            rate, length = measure(step, reader_seconds, switch)
            print(
                f"threads switch after {switch * 1e3:.2f} ms, readers take {reader_seconds * 1e6:3.0f} µs a list: "
                f"{rate:6,.0f} tokens/s, {length:.1f} tokens a list"
            )


if __name__ == "__main__":
    main()
