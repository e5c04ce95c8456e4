"""`/v1/chat/completions`: what the assistant says next, by the run's chat template."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from p828.data.tokenizer.chat_template import TemplateFailed
from p828.errors import ConfigError
from p828.inference.answer import template_in
from p828.inference.decode.sequence import Wants
from p828.serve.api.answering import EventStream, merged, whole_response
from p828.serve.api.choice import Choice, Piece, Prompt
from p828.serve.api.fields import checked
from p828.serve.api.logprobs import experts_of, of_chat
from p828.serve.api.requests import ChatRequest, Message
from p828.serve.api.service import Service, in_thread, tokenized
from p828.serve.api.usage import FINISH_REASONS, usage_of
from p828.serve.http.body import read_json
from p828.serve.http.refusal import Refused, wrong_field


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    check_has_template(service)
    asked = checked(ChatRequest, await read_json(request))
    service.check_model(asked.model)
    prompt = await in_thread(lambda: chat_prompt(service, asked.messages))
    service.check_length(prompt.ids, "messages")
    sampling = asked.sampling(asked.most_tokens or service.scheduler.max_length)
    template = template_in(service.tokenizer)
    if template.end_of_turn and not template.end_token:
        sampling = replace(sampling, stop=(*sampling.stop, template.end_of_turn))
    wants = Wants(asked.logprobs, asked.top_logprobs or 0, False, asked.experts)
    choices = service.submit([prompt], asked.n, sampling, asked.seed, wants)
    answer = _Answer(service, asked, prompt, choices)
    if asked.stream:
        return EventStream(choices, answer.events())
    return await whole_response(request, choices, answer.whole())


def check_has_template(service: Service) -> None:
    """Raises Refused."""
    try:
        template_in(service.tokenizer)
    except ConfigError as error:
        raise Refused(400, f"{error}; /v1/completions continues text", "messages", "no_chat_template") from None


def chat_prompt(service: Service, messages: Sequence[Message]) -> Prompt:
    """The conversation up to where the assistant begins. Raises Refused for messages that the template refuses."""
    tokenizer = service.tokenizer
    try:
        text = template_in(tokenizer).prompt([message.plain() for message in messages])
    except TemplateFailed as error:
        raise wrong_field("messages", f"messages: the chat template refuses them: {error}") from None
    (tokens,) = tokenized(lambda: tokenizer.encode_marked([text]))
    return Prompt(text, tokens["id"].tolist(), tokenizer.end_ids)


class _Answer:
    """To one request, as OpenAI's API has it."""

    def __init__(self, service: Service, asked: ChatRequest, prompt: Prompt, choices: Sequence[Choice]) -> None:
        self._service, self._asked, self._prompt, self._choices = service, asked, prompt, choices
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if asked.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        choices = []
        for index, piece in enumerate(await asyncio.gather(*[choice.whole() for choice in self._choices])):
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append({"index": index, "message": message, **self._rest(piece)})
        return {**self._head, "choices": choices, "usage": usage_of([self._prompt], self._choices)}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self._asked.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        silent = {choice.index for choice in self._choices}
        async with aclosing(merged(self._choices)) as arriving:
            async for choice, piece in arriving:
                role = {"role": "assistant"} if choice.index in silent else {}
                silent.discard(choice.index)
                delta = {**role, "content": piece.text}
                events = [{"index": choice.index, "delta": delta, **self._rest(piece)}]
                yield {**self._head, "choices": events, **usage}
        if usage:
            yield {**self._head, "choices": [], "usage": usage_of([self._prompt], self._choices)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        logprobs = of_chat(self._service.tokenizer, piece.tokens) if self._asked.logprobs else None
        reason = FINISH_REASONS[piece.finish_reason] if piece.finish_reason else None
        experts = {"experts": experts_of(piece.tokens)} if self._asked.experts else {}
        return {"logprobs": logprobs, "finish_reason": reason, **experts}
