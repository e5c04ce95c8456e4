"""`/v1/completions`: texts or token ids, continued."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from p828.inference.decode.sequence import Wants
from p828.serve.api.answering import EventStream, merged, whole_response
from p828.serve.api.choice import Choice, Piece, Prompt, offsets_of
from p828.serve.api.fields import checked
from p828.serve.api.logprobs import experts_of, of_completion
from p828.serve.api.requests import CompletionRequest
from p828.serve.api.service import Service, in_thread, tokenized
from p828.serve.api.usage import FINISH_REASONS, usage_of
from p828.serve.http.body import read_json


async def complete(request: Request) -> Response:
    service: Service = request.app.state.service
    asked = checked(CompletionRequest, await read_json(request))
    service.check_model(asked.model)
    sampling = asked.sampling(max(asked.max_tokens, 1))
    prompts = await in_thread(lambda: [_prompt(service, asked, given) for given in asked.prompts])
    has_logprobs = asked.logprobs is not None
    wants = Wants(has_logprobs, asked.logprobs or 0, asked.echo and has_logprobs, asked.experts)
    choices = service.submit(prompts, asked.n, sampling, asked.seed, wants)
    answer = _Answer(service, asked, prompts, choices)
    if asked.stream:
        return EventStream(choices, answer.events())
    return await whole_response(request, choices, answer.whole())


def _prompt(service: Service, asked: CompletionRequest, given: str | list[int]) -> Prompt:
    """Raises Refused."""
    tokenizer = service.tokenizer
    if isinstance(given, str):
        text, ids = given, service.encode(given)
    else:
        service.check_ids(given, "prompt")
        text, ids = tokenized(lambda: tokenizer.decode(given)), given
    service.check_length(ids, "prompt")
    has_offsets = asked.echo and (asked.logprobs is not None or asked.experts)
    offsets = tokenized(lambda: offsets_of(tokenizer, ids)) if has_offsets else ()
    return Prompt(text, ids, (), offsets, asked.echo, asked.max_tokens == 0)


class _Answer:
    """To one request, as OpenAI's API has it."""

    def __init__(
        self, service: Service, asked: CompletionRequest, prompts: Sequence[Prompt], choices: Sequence[Choice]
    ) -> None:
        self._service, self._asked, self._prompts, self._choices = service, asked, prompts, choices
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        pieces = await asyncio.gather(*[choice.whole() for choice in self._choices])
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self._asked.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        async with aclosing(merged(self._choices)) as arriving:
            async for choice, piece in arriving:
                yield {**self._head, "choices": [self._choice(choice.index, piece)], **usage}
        if usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = of_completion(self._service.tokenizer, piece.tokens)
        reason = FINISH_REASONS[piece.finish_reason] if piece.finish_reason else None
        experts = {"experts": experts_of(piece.tokens)} if self._asked.experts else {}
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason, **experts}

    def _usage(self) -> dict[str, int]:
        return usage_of(self._prompts, self._choices)
