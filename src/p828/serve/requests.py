"""The fields of each request: their types and ranges, and what is refused by name.

Types are checked here, and most ranges by `SamplingConfig`. A field that is null is not given.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from p828.config.values import shown
from p828.errors import ConfigError, did_you_mean
from p828.inference.decode.sequence import MOST_LIKELIEST
from p828.inference.sampling import SamplingConfig
from p828.serve.refusal import Refused, wrong_field

MOST_CHOICES = 128  # of a request: prompts times n
MOST_STOPS, LONGEST_STOP = 16, 256  # each is looked for with every token
MOST_MESSAGES = 4096

# What other servers know and this one does not, with the values that ask for nothing and are therefore accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "audio": (), "bad_words": ([],), "frequency_penalty": (0,), "function_call": ("none",),
    "functions": ([],), "grammar": (), "guided_choice": (), "guided_grammar": (), "guided_json": (),
    "guided_regex": (), "ignore_eos": (False,), "length_penalty": (1,), "logit_bias": ({},), "metadata": ({},),
    "min_tokens": (0,), "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (),
    "presence_penalty": (0,), "prompt_logprobs": (), "reasoning_effort": ("none",), "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"), "skip_special_tokens": (True,), "stop_token_ids": ([],), "store": (False,),
    "structured_outputs": (), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],),
    "truncate_prompt_tokens": (), "typical_p": (1,), "use_beam_search": (False,), "verbosity": ("medium",),
    "web_search_options": (),
}  # fmt: skip

Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
R = TypeVar("R", bound="Fields")


class Fields(BaseModel):
    """What every request may have. Types are strict: `"1"` and `true` are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Generation(Fields):
    """What is the same for text and for messages. The defaults are those of OpenAI's API."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Whole = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    experts: bool = False
    """Whether each choice has the experts of its tokens."""
    user: str | None = None
    """Who asks, for a provider's statistics; nothing is kept here, and so of the next two."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, given: Any) -> Any:
        stops = [given] if isinstance(given, str) else given
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("a text or a list of texts is accepted")
        if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
            raise ValueError(f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters are accepted")
        return tuple(stops)

    def sampling(self, max_new_tokens: int) -> SamplingConfig:
        """Raises Refused for a value out of range."""
        try:
            return SamplingConfig(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                max_new_tokens=max_new_tokens,
                stop=self.stop,
                seed=self.seed or 0,
            )
        except ConfigError as error:
            raise wrong_field(str(error).partition(" = ")[0], str(error)) from None


class CompletionRequest(Generation):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(union_mode="left_to_right")
    max_tokens: Whole = 16
    """0 is for `echo`: the prompt's own probabilities."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    echo: bool = False
    best_of: int | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Raises Refused where there is none, or more than are answered at once."""
        given: Any = self.prompt
        prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not prompts:
            raise wrong_field("prompt", "prompt = []: a text, token ids, or a list of either is accepted")
        if len(prompts) * self.n > MOST_CHOICES:
            asked = f"{len(prompts)} prompts with n = {self.n}"
            raise wrong_field("prompt", f"prompt: {asked} are given: at most {MOST_CHOICES} answers are accepted")
        return prompts


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """The keys of which a template may write something."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: content that is given in parts is joined."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {**self.model_dump(exclude_none=True), "content": content}


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    """The newer name of `max_tokens`. Without either an answer ends where the model ends it, or at the context's."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Raises Refused where both names are given, and differ."""
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older is not None and newer != older:
            raise wrong_field(
                "max_tokens", f"max_tokens = {older} and max_completion_tokens = {newer}: one of them is accepted"
            )
        return older if newer is None else newer


class TokenizeRequest(Fields):
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_generation_prompt: Literal[True] = True
    add_special_tokens: bool = False
    """Nothing is added either way: this is how a prompt's text becomes tokens."""
    return_token_strs: bool = False


class DetokenizeRequest(Fields):
    tokens: list[int]


def checked(kind: type[R], values: dict[str, Any]) -> R:
    """The request. Raises Refused, which names the first wrong field, what was given, and what is accepted."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in [name for name in given if name not in kind.model_fields]:
        if name not in UNSUPPORTED:
            near = did_you_mean(name[:80], kind.model_fields)
            accepted = ", ".join(kind.model_fields)
            raise Refused(400, f"unknown field {shown(name)}{near} Accepted: {accepted}", name[:80], "unknown_field")
        _check_unsupported(name, given.pop(name))
    for message in given["messages"] if isinstance(given.get("messages"), list) else ():
        if isinstance(message, dict):  # what a client got as an answer has many nulls
            for name in [name for name, value in message.items() if value is None]:
                del message[name]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(kind, given, error) from None


def _check_unsupported(name: str, value: Any) -> None:
    neutral = UNSUPPORTED[name]
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
        return
    accepted = f"{' or '.join(shown(one) for one in neutral)} is accepted" if neutral else "leave it out"
    raise Refused(400, f"{name} = {shown(value)}: not supported by this server; {accepted}", name, "unsupported_field")


def _refusal(kind: type[Fields], given: dict[str, Any], error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_context=False)[0]
    place, said = _place(first["loc"], given), first["msg"].removeprefix("Value error, ")
    top = str(first["loc"][0])
    if first["type"] == "missing":
        return Refused(400, f"{place}: is missing", top, "missing_field")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"unknown field {place}{_near(kind, first['loc'])}", place, "unknown_field")
    if top == "prompt" and kind is CompletionRequest:
        said = "a text, a list of texts, a list of token ids, or a list of such lists is accepted"
        place = top
    value = _at(given, first["loc"])
    return wrong_field(place, f"{place} = {shown(value)}: {said[0].lower()}{said[1:]}")


def _near(kind: type[Fields], loc: Sequence[str | int]) -> str:
    return did_you_mean(str(loc[-1])[:80], Message.model_fields if "messages" in loc else ["include_usage"])


def _place(loc: Sequence[str | int], given: Any) -> str:
    """`messages[0].content`, without the names that pydantic gives to the types of a union."""
    place = ""
    for step in loc:
        if isinstance(step, int):
            place += f"[{step}]"
        elif not isinstance(given, dict):
            break
        else:
            place += f".{shown_name(step)}" if place else shown_name(step)
        given = _at(given, [step])
    return place


def shown_name(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 80 else shown(name)


def _at(value: Any, loc: Sequence[str | int]) -> Any:
    for step in loc:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else value
        elif isinstance(value, dict):
            value = value.get(step)
    return value
