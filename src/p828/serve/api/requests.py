"""The fields of each request: their types and ranges. A field that is null is not given.

Types are checked here, and what a `SamplingConfig` has in its own words there.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from p828.config.values import shown
from p828.errors import ConfigError
from p828.inference.decode.sequence import MOST_LIKELIEST
from p828.inference.sampling_config import SamplingConfig
from p828.serve.http.refusal import wrong_field

MOST_CHOICES = 128  # of a request: prompts times n
MOST_STOPS, LONGEST_STOP = 16, 256  # each is looked for with every token
MOST_MESSAGES = 4096

Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Likeliest = Annotated[int, Field(ge=0, le=MOST_LIKELIEST)]


class Strict(BaseModel):
    """Types are strict: `"1"` and `true` are no numbers. An unknown field is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Fields(Strict):
    """What every request may have."""

    model: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    """Whether one more event at the end has the numbers of tokens."""


class Generation(Fields):
    """What is the same for text and for messages. The defaults are those of OpenAI's API."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Whole = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    experts: bool = False
    """Whether each choice has the experts of its tokens."""
    user: str | None = None
    """Who asks, for a provider's statistics; nothing is kept here, nor of the next two."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, given: Any) -> Any:
        stops = [given] if isinstance(given, str) else given
        if not are(stops, str):
            raise ValueError("a text or a list of texts is accepted")
        if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
            raise ValueError(f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters are accepted")
        return tuple(stops)

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is accepted with stream = true")
        return self

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
                seed=0 if self.seed is None else self.seed,
            )
        except ConfigError as error:
            raise wrong_field(str(error).partition(" = ")[0], str(error)) from None


class CompletionRequest(Generation):
    prompt: Any
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    max_tokens: Whole = 16
    """0 is for `echo`: the prompt alone."""
    logprobs: Likeliest | None = None
    echo: bool = False
    best_of: int | None = None

    @field_validator("prompt")
    @classmethod
    def _is_prompt(cls, given: Any) -> Any:
        is_list = isinstance(given, list) and len(given) > 0
        is_one_list = is_list and (are(given, str) or are(given, int))
        if not (isinstance(given, str) or is_one_list or (is_list and all(are(ids, int) for ids in given))):
            raise ValueError("a text, a list of texts, a list of token ids, or a list of such lists is accepted")
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.best_of not in (None, 1, self.n):
            line = f"best_of = {shown(self.best_of)}: answers are not ranked: n, which is {self.n}, is accepted"
            raise ValueError(line)
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens = 0: accepted with echo = true")
        if len(self.prompts) * self.n > MOST_CHOICES:
            asked = f"{len(self.prompts):,} of them and n = {self.n}"
            raise ValueError(f"prompt: {asked} are given: at most {MOST_CHOICES} answers are accepted")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each by itself."""
        is_one = isinstance(self.prompt, str) or type(self.prompt[0]) is int
        prompts: list[str] | list[list[int]] = [self.prompt] if is_one else self.prompt
        return prompts


class Message(Strict):
    """The keys of which a template may write something."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, given: Any) -> Any:
        """Content that is given in parts, as one text."""
        parts = given if isinstance(given, list) else [{"type": "text", "text": given}]
        if not are(parts, dict) or not all({*part} == {"type", "text"} and part["type"] == "text" for part in parts):
            raise ValueError('text, or a list of {"type": "text", "text": TEXT}, is accepted')
        texts = [part["text"] for part in parts]
        if not are(texts, str):
            raise ValueError("text is accepted")
        return "".join(texts)

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise ValueError(f"no content is given, which a message of the {self.role} has")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"content": "", **self.model_dump(exclude_unset=True)}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]


class ChatRequest(Generation):
    messages: Messages
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    """The newer name of `max_tokens`. Without either an answer ends where the model ends it, or at the context's."""
    logprobs: bool = False
    top_logprobs: Likeliest | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older is not None and newer != older:
            raise ValueError(f"max_tokens = {older}: max_completion_tokens = {newer} says otherwise; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is accepted with logprobs = true")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Fields):
    """Of a text, or of messages up to where the assistant's answer begins."""

    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    """Nothing is added either way: this is how a prompt's text becomes tokens."""
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages is accepted, one of them")
        if not self.add_generation_prompt:
            raise ValueError("add_generation_prompt = false: true is accepted, as the assistant is to answer")
        return self


class DetokenizeRequest(Fields):
    tokens: list[int]

    @field_validator("tokens", mode="before")
    @classmethod
    def _are_ids(cls, given: Any) -> Any:
        if not are(given, int):  # here, since pydantic would list each that is none
            raise ValueError("a list of token ids is accepted")
        return given


def are(values: Any, kind: type) -> bool:
    """Whether it is a list with entries of this very type."""
    return isinstance(values, list) and all(type(value) is kind for value in values)
