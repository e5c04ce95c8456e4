"""From a JSON object to a request: what is wrong with a field is said in a line that names it."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from p828.config.values import shown
from p828.errors import did_you_mean
from p828.serve.api.requests import Fields, Message, StreamOptions
from p828.serve.http.refusal import Refused, wrong_field

R = TypeVar("R", bound=Fields)
LONGEST_NAME = 80  # characters

# What other servers know and this one does not, with the values that ask for nothing and are therefore accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "audio": (), "bad_words": ([],), "frequency_penalty": (0,), "function_call": ("none",),
    "functions": ([],), "grammar": (), "guided_choice": (), "guided_grammar": (), "guided_json": (),
    "guided_regex": (), "ignore_eos": (False,), "length_penalty": (1,), "logit_bias": ({},), "metadata": ({},),
    "min_tokens": (0,), "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (),
    "presence_penalty": (0,), "prompt_logprobs": (), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "skip_special_tokens": (True,),
    "stop_token_ids": ([],), "store": (False,), "structured_outputs": (), "suffix": ("",),
    "tool_choice": ("none", "auto"), "tools": ([],), "truncate_prompt_tokens": (), "typical_p": (1,),
    "use_beam_search": (False,), "verbosity": ("medium",), "web_search_options": (),
}  # fmt: skip

# By pydantic's types of errors, what is accepted.
ACCEPTED = {
    "int_type": "a whole number is accepted",
    "int_from_float": "a whole number is accepted",
    "float_type": "a number is accepted",
    "finite_number": "a finite number is accepted",
    "bool_type": "true or false is accepted",
    "string_type": "text is accepted",
    "list_type": "a list is accepted",
    "dict_type": "an object is accepted",
    "model_type": "an object is accepted",
    "greater_than_equal": "at least {ge} is accepted",
    "less_than_equal": "at most {le} is accepted",
    "literal_error": "{expected} is accepted",
    "too_short": "at least {min_length} is accepted",
    "too_long": "at most {max_length} are accepted",
}


def checked(kind: type[R], values: dict[str, Any]) -> R:
    """The request. Raises Refused, which names the first wrong field, what was given, and what is accepted."""
    given = _without_nulls(values)
    for name in [name for name in given if name not in kind.model_fields]:
        if name not in UNSUPPORTED:
            near = did_you_mean(name[:LONGEST_NAME], kind.model_fields)
            accepted = ", ".join(kind.model_fields)
            line = f"unknown field {shown(name)}{near} Accepted: {accepted}"
            raise Refused(400, line, name[:LONGEST_NAME], "unknown_field")
        _check_unsupported(name, given.pop(name))
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(given, error.errors(include_url=False)[0]) from None


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Also of each message: one that a client got as an answer has many."""
    given = {name: value for name, value in values.items() if value is not None}
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [
            {name: value for name, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    return given


def _check_unsupported(name: str, value: Any) -> None:
    """Raises Refused for a value that asks for something."""
    neutral = UNSUPPORTED[name]
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
        return
    accepted = f"{' or '.join(shown(one) for one in neutral)} is accepted" if neutral else "leave it out"
    raise Refused(400, f"{name} = {shown(value)}: not supported by this server; {accepted}", name, "unsupported_field")


def _refusal(given: dict[str, Any], error: ErrorDetails) -> Refused:
    loc, place = error["loc"], _place(error["loc"])
    if error["type"] == "missing":
        return Refused(400, f"{place} is missing", place, "missing_field")
    if error["type"] == "extra_forbidden":
        known = Message.model_fields if loc[0] == "messages" else StreamOptions.model_fields
        near = did_you_mean(str(loc[-1])[:LONGEST_NAME], known)
        return Refused(400, f"unknown field {place}{near} Accepted: {', '.join(known)}", place, "unknown_field")
    words = ACCEPTED.get(error["type"])
    accepted = words.format(**error.get("ctx", {})) if words else error["msg"].removeprefix("Value error, ")
    if not loc:  # of several fields together, the first of which begins the line
        return wrong_field(accepted.split()[0].rstrip(":"), accepted)
    return wrong_field(place, f"{place} = {shown(_at(given, loc))}: {accepted}")


def _place(loc: Sequence[str | int]) -> str:
    """`messages[0].content`"""
    steps = [f"[{step}]" if isinstance(step, int) else f".{_named(step)}" for step in loc]
    return "".join(steps).removeprefix(".")


def _named(name: str) -> str:
    return name if name.isidentifier() and len(name) <= LONGEST_NAME else shown(name)


def _at(value: Any, loc: Sequence[str | int]) -> Any:
    for step in loc:
        value = value[step]
    return value
