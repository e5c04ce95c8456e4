"""Log-probabilities of tokens in the shapes of OpenAI's two interfaces, and the experts of tokens."""

from collections.abc import Sequence
from typing import Any

from p828.data.tokenizer.token_bytes import bytes_of
from p828.data.tokenizer.tokenizer import CUT_CHARACTER, Tokenizer
from p828.serve.api.choice import PlacedToken


def of_completion(tokenizer: Tokenizer, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
    """Lists with an entry a token; of the prompt's first token, which nothing comes before, it is null.

    The likeliest tokens have the chosen one among them, as one more if it is none of them. Of two that are spelled the
    same the likelier one is told.
    """
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for placed in tokens:
        probability = placed.probability
        spelled = token_text(tokenizer, placed.token)
        found["tokens"].append(spelled)
        found["text_offset"].append(placed.offset)
        found["token_logprobs"].append(None if probability is None else probability.value)
        if probability is None:
            found["top_logprobs"].append(None)
            continue
        likeliest: dict[str, float] = {}
        for token, value in [*probability.likeliest, (placed.token, probability.value)]:
            likeliest.setdefault(token_text(tokenizer, token), value)
        found["top_logprobs"].append(likeliest)
    return found


def of_chat(tokenizer: Tokenizer, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
    content = []
    for placed in tokens:
        assert placed.probability is not None
        likeliest = [_entry(tokenizer, *one) for one in placed.probability.likeliest]
        content.append({**_entry(tokenizer, placed.token, placed.probability.value), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def experts_of(tokens: Sequence[PlacedToken]) -> list[Any]:
    """Of each token the experts of each layer; null of the prompt's tokens and of the first, which reading it gave."""
    return [placed.experts_LK for placed in tokens]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text; of one that has none, as a part of a character or a special one, how it is spelled."""
    text = tokenizer.decode([token])
    return text if text and CUT_CHARACTER not in text else tokenizer.inner.id_to_token(token) or ""


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    own_bytes = list(bytes_of(tokenizer.inner, token))
    return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": own_bytes}
