"""What the server answers from: the scheduler of one model, its tokenizer, and the names that clients use."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from p828.config.values import shown
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import DataError, did_you_mean
from p828.inference.decode.sequence import Wants
from p828.inference.generate import prompt_seed
from p828.inference.sampling_config import SamplingConfig
from p828.serve.api.choice import Choice, Prompt
from p828.serve.http.refusal import Refused, wrong_field
from p828.serve.scheduling.limits import Limits
from p828.serve.scheduling.metrics import Metrics
from p828.serve.scheduling.scheduler import Scheduler
from p828.serve.scheduling.submission import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    scheduler: Scheduler
    tokenizer: Tokenizer
    metrics: Metrics
    limits: Limits
    model_name: str
    """The run's name."""
    created: int
    """When the server began, in seconds since 1970."""
    n_routed_experts: int

    def check_model(self, name: str | None) -> None:
        """Raises Refused for a model that is not here."""
        if name not in (None, self.model_name):
            near = did_you_mean(name[:80], [self.model_name])
            raise Refused(
                404, f"no model {name[:80]!r} here{near} There is {self.model_name}", "model", "model_not_found"
            )

    def check_length(self, ids: Sequence[int], param: str) -> None:
        """Raises Refused for a prompt that leaves no room for a token."""
        most = self.scheduler.max_length - 1
        if len(ids) >= self.scheduler.max_length:
            line = f"the prompt has {len(ids):,} tokens: at most {most:,} are accepted, for the context is {most + 1:,}"
            raise Refused(400, line, param, "context_length_exceeded")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises Refused for a number that is no token's."""
        most = self.tokenizer.vocab_size - 1
        wrong = next((token for token in ids if not 0 <= token <= most), None)
        if wrong is not None:
            raise wrong_field(param, f"{param}: the token id {shown(wrong)} is given: 0 to {most} are accepted")

    def encode(self, text: str) -> list[int]:
        """Raises Refused for text that the tokenizer fails on."""
        return tokenized(lambda: self.tokenizer.encode(text))

    def submit(
        self, prompts: Sequence[Prompt], n: int, sampling: SamplingConfig, seed: int | None, wants: Wants
    ) -> list[Choice]:
        """`n` answers to each prompt, all or none of them.

        Without a seed they are other ones each time. With one, an answer is that of `p828 generate` with this seed.
        Raises Unanswered, and Refused for more than can ever run or wait.
        """
        most = self.limits.max_running + self.limits.max_waiting
        if len(prompts) * n > most:
            line = f"{len(prompts) * n} answers are asked for: at most {most} are accepted, which run or wait at a time"
            raise Refused(400, line, "n" if n > 1 else "prompt", "too_many_answers")
        seed = secrets.randbits(32) if seed is None else seed
        equal_before: Counter[str] = Counter()
        each = [prompt for prompt in prompts for _ in range(n)]
        requests = []
        for prompt in each:
            own = prompt_seed(seed, prompt.text, equal_before[prompt.text])
            equal_before[prompt.text] += 1
            requests.append(Request(tuple(prompt.ids), sampling, own, frozenset(prompt.end_ids), wants))
        submissions = self.scheduler.submit_all(requests)
        try:
            return [
                Choice(index, prompt, submission, self.tokenizer, sampling.stop)
                for index, (prompt, submission) in enumerate(zip(each, submissions, strict=True))
            ]
        except BaseException:
            for submission in submissions:
                submission.cancel()
            raise


def cancel(choices: Sequence[Choice]) -> None:
    """Give up those that have not ended."""
    for choice in choices:
        choice.submission.cancel()


def tokenized(work: Callable[[], T]) -> T:
    """What the tokenizer makes. Raises Refused where it fails, as on text that its vocabulary has no token for."""
    try:
        return work()
    except DataError as error:
        raise wrong_field("prompt", str(error)) from None


async def in_thread(work: Callable[[], T]) -> T:
    """The work's result; meanwhile other clients are answered."""
    return await asyncio.to_thread(work)
