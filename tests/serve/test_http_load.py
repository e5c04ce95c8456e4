"""Many requests over HTTP, of clients that come and go: each answer is the one got alone, and nothing stays."""

import asyncio
import gc
import json
import random
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from serving import CONTEXT, Served, serving

from p828.inference.generate import TextStream

AT_A_TIME = 64


class Alone:
    """What greedy decoding gives a prompt, by passes over the whole text and without a cache."""

    def __init__(self, served: Served) -> None:
        self._model, self._tokenizer = served.loaded.model, served.loaded.tokenizer
        self._known: dict[tuple[tuple[int, ...], int], str] = {}

    def text(self, prompt: tuple[int, ...], most: int) -> str:
        if (prompt, most) not in self._known:
            self._known[prompt, most] = self._decode(prompt, most)
        return self._known[prompt, most]

    def _decode(self, prompt: tuple[int, ...], most: int) -> str:
        ids, stream, text = list(prompt), TextStream(self._tokenizer, list(prompt), ()), ""
        with torch.no_grad():
            while len(ids) < min(len(prompt) + most, CONTEXT):
                hidden_SH = self._model(torch.tensor([ids])).hidden_BSH[0]
                token = int(self._model.logits(hidden_SH[-1])[: self._tokenizer.vocab_size].argmax())
                if token == self._tokenizer.eos_id:
                    break
                ids.append(token)
                text += stream.push(token)
        return text + stream.finish()


class Browser:
    """One of the clients that ask at a time. What it does follows from its seed."""

    def __init__(self, client: httpx.AsyncClient, alone: Alone, seed: int, outcomes: Counter[str]) -> None:
        self._client, self._alone, self._outcomes = client, alone, outcomes
        self._random = random.Random(seed)

    async def ask(self, requests: int) -> None:
        for _ in range(requests):
            length, start = self._random.choice([1, 5, 17, 90]), self._random.randrange(4)
            prompt = tuple((length * (start + number) + start) % 250 for number in range(length))
            most = self._random.choice([1, 3, 30])
            way = self._random.choice([self._whole, self._whole, self._streamed, self._streamed, self._hasty])
            text = await way({"prompt": prompt, "max_tokens": most, "temperature": 0})
            right = self._alone.text(prompt, most)
            assert text is None or text == right
            self._outcomes["left" if text is None else "answered"] += 1

    async def _whole(self, body: dict[str, object]) -> str | None:
        while (answer := await self._client.post("/v1/completions", json=body)).status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            self._outcomes["refused"] += 1
            await asyncio.sleep(0.01)  # sooner than asked, so that the queue stays full
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def _streamed(self, body: dict[str, object]) -> str | None:
        """Sometimes it goes after an event or two."""
        text, events = "", self._random.choice([1, 2, 1000, 1000])
        async with self._client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code == 429:
                await answer.aread()
                return await self._whole(body)
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return text
                if line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    events -= 1
                if not events:
                    return None
        raise AssertionError("a stream ended without its last event")

    async def _hasty(self, body: dict[str, object]) -> str | None:
        """It goes without having read anything."""
        task = asyncio.create_task(self._client.post("/v1/completions", json=body))
        await asyncio.sleep(self._random.random() / 50)
        if task.done():
            await task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None


def served_requests(served: Served, requests: int) -> Counter[str]:
    """Asks that many, and returns how they ended."""
    outcomes: Counter[str] = Counter()

    async def ask() -> None:
        alone = Alone(served)
        limits = httpx.Limits(max_connections=AT_A_TIME)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
            shares = [requests // AT_A_TIME + (number < requests % AT_A_TIME) for number in range(AT_A_TIME)]
            browsers = [Browser(client, alone, number, outcomes) for number in range(AT_A_TIME)]
            await asyncio.gather(*[browser.ask(share) for browser, share in zip(browsers, shares, strict=True)])

    asyncio.run(ask())
    return outcomes


@pytest.mark.parametrize("requests", [128, pytest.param(1000, marks=pytest.mark.long)])
def test_none_is_lost_or_mixed_up_over_http(chat_run: Path, requests: int) -> None:
    with serving(chat_run, max_running=16, max_waiting=16) as served:
        outcomes = served_requests(served, requests)
    assert outcomes["answered"] + outcomes["left"] == requests
    assert outcomes["answered"] > requests / 3
    assert outcomes["left"] > requests / 5
    assert outcomes["refused"]


@pytest.mark.long
def test_memory_of_the_server_is_flat_over_10_000_requests(chat_run: Path) -> None:
    """Of client and server, which are one process; after a fifth of them, which fill the allocators' pools."""

    def ask(served: Served, requests: int) -> int:
        async def one(client: httpx.AsyncClient, number: int) -> None:
            body = {"prompt": [number % 250], "max_tokens": 2, "temperature": 0}
            assert (await client.post("/v1/completions", json=body)).status_code == 200

        async def all_of() -> None:
            async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
                for begin in range(0, requests, 50):
                    await asyncio.gather(*[one(client, number) for number in range(begin, begin + 50)])

        asyncio.run(all_of())
        gc.collect()
        return psutil.Process().memory_info().rss

    with serving(chat_run, max_running=16) as served:
        before = ask(served, 2000)
        after = ask(served, 8000)
    print(f"resident: {before / 2**20:.1f} MiB after 2,000 requests, {after / 2**20:.1f} after 10,000")
    assert after - before < 8000 * 100
