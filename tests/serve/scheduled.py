"""A scheduler over a tiny model, and answers to hold its own against."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from prometheus_client.parser import text_string_to_metric_families

from p828.inference.decode.decoder import Decoder
from p828.inference.decode.sequence import NOTHING_MORE, NewToken, Wants
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from p828.serve.scheduling.limits import Limits
from p828.serve.scheduling.metrics import Metrics
from p828.serve.scheduling.scheduler import Scheduler
from p828.serve.scheduling.submission import Request, Submission
from tiny import tiny_model

EOS, VOCABULARY, SLOTS = 96, 97, 8


@cache
def model() -> Transformer:
    return tiny_model()


def decoder(slots: int = SLOTS) -> Decoder:
    return Decoder(model(), VOCABULARY, EOS, torch.float32, slots, prefill_tokens=16)


def running_behind(decoder: Decoder) -> Decoder:
    """As on a GPU: a step's tokens are known with the next step."""
    decoder._steps.runs_behind = True
    return decoder


class HeldDecoder(Decoder):
    """Whose steps wait until they may begin: so that a test says what happens while a request runs."""

    def __init__(self, slots: int = SLOTS) -> None:
        super().__init__(model(), VOCABULARY, EOS, torch.float32, slots)
        self.may_go_on = threading.Event()
        self.is_in_step = threading.Event()
        self.errors: list[Exception] = []
        """Each is raised by a step in place of its work."""
        self.most_running = 0
        self.gives_nothing = False
        """Its steps come to nothing, so that no request ends."""

    def step(self) -> list[NewToken]:
        self.most_running = max(self.most_running, len(self.running))
        self.is_in_step.set()
        assert self.may_go_on.wait(60)
        if self.errors:
            raise self.errors.pop(0)
        return [] if self.gives_nothing else super().step()


@contextmanager
def scheduling(decoder: Decoder, metrics: Metrics | None = None, **limits: float) -> Iterator[Scheduler]:
    """A scheduler at work. Nothing is left of any request when it ends, or the block fails."""
    limits = {"max_running": decoder.free_slots, "max_seconds": 120.0, **limits}
    scheduler = Scheduler(decoder, Limits(**limits), metrics or Metrics("mine", decoder.max_length))
    scheduler.start()
    yield scheduler
    scheduler.close(grace_seconds=60)
    scheduler.check_idle()


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Values by name, and by the labels beside the model's name, which all of them have."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for name, labels, value, *_ in family.samples:
            assert labels.pop("model_name") == "mine"
            found[(name, *labels.values())] = value
    return found


def request(*prompt: int, tokens: int = 6, seed: int = 0, wants: Wants = NOTHING_MORE, **sampling: float) -> Request:
    config = SamplingConfig(**{"temperature": 0.0, "max_new_tokens": tokens, **sampling})
    return Request(prompt, config, seed, frozenset(), wants)


async def answer(submission: Submission) -> list[int]:
    """All tokens, with the one that ends."""
    return [new.token async for tokens in submission for new in tokens]


async def answers(scheduler: Scheduler, requests: list[Request]) -> list[list[int]]:
    return await asyncio.gather(*[answer(scheduler.submit(request)) for request in requests])


def in_one_loop(scheduler: Scheduler, *requests: Request) -> list[list[int]]:
    return asyncio.run(answers(scheduler, list(requests)))


@cache
def likeliest(prompt: tuple[int, ...], most: int) -> list[int]:
    """What greedy decoding gives, by passes over the whole text and without a cache."""
    ids: list[int] = list(prompt)
    with torch.no_grad():
        while len(ids) < min(len(prompt) + most, model().config.max_position_embeddings):
            hidden_SH = model()(torch.tensor([ids])).hidden_BSH[0]
            ids.append(int(model().logits(hidden_SH[-1]).argmax()))
            if ids[-1] == EOS:
                break
    return ids[len(prompt) :]


def alone(request: Request) -> list[int]:
    """What a decoder gives for this request when it has no other."""
    one = decoder(slots=1)
    sequence = one.admit(request.prompt, request.config, request.seed, request.end_ids, request.wants)
    tokens = []
    while sequence.finish_reason is None:
        tokens += [new.token for new in one.step()]
    return tokens
