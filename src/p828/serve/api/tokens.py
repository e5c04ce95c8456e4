"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from p828.serve.api.chat import chat_prompt, check_has_template
from p828.serve.api.fields import checked
from p828.serve.api.logprobs import token_text
from p828.serve.api.requests import DetokenizeRequest, TokenizeRequest
from p828.serve.api.service import Service, in_thread, tokenized
from p828.serve.http.body import read_json


async def tokenize(request: Request) -> Response:
    """A text's tokens, or a conversation's, as the model would read them as a prompt."""
    service: Service = request.app.state.service
    asked = checked(TokenizeRequest, await read_json(request))
    service.check_model(asked.model)
    return JSONResponse(await in_thread(lambda: _tokens(service, asked)))


def _tokens(service: Service, asked: TokenizeRequest) -> dict[str, Any]:
    if asked.messages is not None:
        check_has_template(service)
        ids = [*chat_prompt(service, asked.messages).ids]
    else:
        assert asked.prompt is not None
        ids = service.encode(asked.prompt)
    texts = [token_text(service.tokenizer, token) for token in ids] if asked.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.scheduler.max_length, "tokens": ids, "token_strs": texts}


async def detokenize(request: Request) -> Response:
    """The text of tokens; special ones have none."""
    service: Service = request.app.state.service
    asked = checked(DetokenizeRequest, await read_json(request))
    service.check_model(asked.model)
    service.check_ids(asked.tokens, "tokens")
    return JSONResponse({"prompt": await in_thread(lambda: tokenized(lambda: service.tokenizer.decode(asked.tokens)))})
