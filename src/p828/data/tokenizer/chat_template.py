"""Chat templates: conversations to marked text, rendered as transformers' `apply_chat_template` renders them."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from p828.data.tokenizer.marked_text import BEGIN, END, MARK, SPAN_MARK, ControlTokens, spans_of, without_marks
from p828.data.tokenizer.template_environment import compiled
from p828.errors import ConfigError

Messages = list[dict[str, Any]]

# What training and evaluation give for today, so that equal conversations become equal tokens on any day: the day that
# Llama 3's template falls back to.
TRAINING_DAY = datetime(2024, 7, 26)
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKER = re.compile(r"<\|\w+\|>")  # as templates spell what is no text
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
LONGEST_CAUSE = 200  # characters of what a template says

CHATML = """\
{% for message in messages %}
{% if message.tool_calls is defined %}{{ raise_exception('this chat template writes no tool_calls') }}{% endif %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
ZEPHYR = """\
{% for message in messages %}
{% if message.tool_calls is defined %}{{ raise_exception('this chat template writes no tool_calls') }}{% endif %}
{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
BUILT_IN = {"chatml": CHATML, "zephyr": ZEPHYR}


class TemplateFailed(Exception):
    """A template that cannot be used with a conversation; the text says why."""


class ChatTemplate:
    """A template with the special tokens that it may write."""

    def __init__(self, source: str, variables: Mapping[str, str], special_tokens: Sequence[str], where: str) -> None:
        """`variables` are the tokens that it knows by a name, as `eos_token`; `where` it comes from, for messages.

        Raises ConfigError for what is no template.
        """
        self.source, self.variables, self.where = source, dict(variables), where
        self.control = ControlTokens(special_tokens)
        self._finds_spans_itself = GENERATION_TAG.search(source) is not None
        if MARK.search(source):
            raise ConfigError(
                f"{where}: not a chat template: it has a Unicode noncharacter, {MARK.findall(source)[0]!r}"
            )
        try:
            self._template = compiled(source)
            source.encode()
        except (jinja2.TemplateError, UnicodeEncodeError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ConfigError(f"{where}: not a chat template{line}: {_in_short(error)}") from None
        self.end_of_turn, self.end_token, self.problem = "", "", ""
        """What ends an answer; the control token that does, if one does; why it cannot be trained with."""
        try:
            self.end_of_turn, self.end_token = self._find_end()
        except TemplateFailed as error:
            self.problem = str(error)

    @property
    def name(self) -> str:
        """Of a built-in template; of another one where it comes from."""
        return next((name for name, source in BUILT_IN.items() if source == self.source), self.where)

    def check(self) -> None:
        """Raises ConfigError if it cannot be trained with."""
        if self.problem:
            raise ConfigError(f"{self.where}: the chat template cannot be trained with: {self.problem}")

    def render(self, messages: Messages, add_generation_prompt: bool = False, today: datetime = TRAINING_DAY) -> str:
        """The text that transformers renders. Raises TemplateFailed."""
        return SPAN_MARK.sub("", self._render(messages, add_generation_prompt, today))

    def marked(self, messages: Messages) -> str:
        """Marked text of a whole conversation. Raises TemplateFailed, also where the assistant's text is not found.

        Without `{% generation %}` in the template, an assistant's turn begins where the text of the messages before it
        with the generation prompt ends, and ends where the text of the messages up to it does.
        """
        quoted = self.control.quoted(messages)
        rendered = self._render(quoted)
        if self._finds_spans_itself:
            if not spans_of(rendered)[1]:
                raise TemplateFailed("it has {% generation %}, and nothing of this conversation is in it")
            return self.control.marked(rendered)
        turns = [number for number, message in enumerate(quoted) if message["role"] == "assistant"]
        starts = [self._start(quoted, number, rendered) for number in turns]
        pieces, place = [], 0
        for number, start, limit in zip(turns, starts, [*starts[1:], len(rendered)], strict=True):
            end = self._end(quoted, number, rendered, start, limit)
            pieces += [rendered[place:start], BEGIN, rendered[start:end], END]
            place = end
        marked = self.control.marked("".join([*pieces, rendered[place:]]))
        return self.control.without_space_behind(marked)

    def prompt(self, messages: Messages) -> str:
        """Marked text of a conversation up to where the assistant's next turn begins, today. Raises TemplateFailed."""
        rendered = self._render(self.control.quoted(messages), add_generation_prompt=True, today=datetime.now())
        return self.control.marked(SPAN_MARK.sub("", rendered))

    def _render(self, messages: Messages, add_generation_prompt: bool = False, today: datetime = TRAINING_DAY) -> str:
        try:
            rendered = self._template.render(
                **self.variables,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=today.strftime,
            )
            rendered.encode()  # an escape in a template can be half a surrogate pair, which no tokenizer takes
        except Exception as error:  # a template is a program, and what it raises its own
            raise TemplateFailed(_in_short(error)) from None
        return rendered

    def _start(self, messages: Messages, number: int, rendered: str) -> int:
        if number == 0:
            raise TemplateFailed("the conversation begins with the assistant, which answers nothing")
        before = self._render(messages[:number], add_generation_prompt=True)
        if not rendered.startswith(before):
            raise TemplateFailed(
                f"the assistant's turn (message {number + 1}) does not begin with the generation prompt: give a "
                "template with {% generation %} around what the assistant says"
            )
        return len(before)

    def _end(self, messages: Messages, number: int, rendered: str, start: int, limit: int) -> int:
        whole = self._render(messages[: number + 1])
        if rendered.startswith(whole) and len(whole) > start:
            return len(whole)
        # Some templates write the last turn otherwise than those before; its end token tells where it ends.
        end = self.control.next_written(rendered, start, self.end_token) if self.end_token else -1
        if not start < end <= limit:
            raise TemplateFailed(
                f"the end of the assistant's turn (message {number + 1}) is not found, since the template writes it "
                "otherwise where messages follow: give one with {% generation %} around what the assistant says"
            )
        return end

    def _find_end(self) -> tuple[str, str]:
        """What ends an answer, and the control token that does, if one does. Raises TemplateFailed if nothing does."""
        text, spans = spans_of(self.marked(PROBE))
        tail = text[slice(*spans[-1])].rpartition(PROBE[-1]["content"])[2]
        if not tail:
            raise TemplateFailed(
                "nothing of what the assistant says ends an answer, so the model would not learn to end one"
            )
        ranges = self.control.ranges(tail)
        return without_marks(tail), without_marks(tail[slice(*ranges[-1])]) if ranges else ""


def built_in(name: str, eos_token: str, special_tokens: Sequence[str]) -> ChatTemplate:
    """One of `BUILT_IN`. Raises ConfigError for `chatml` without its two tokens."""
    missing = [token for token in sorted(MARKER.findall(BUILT_IN[name])) if token not in special_tokens]
    if name == "chatml" and missing:
        raise ConfigError(
            f'tokenizer.chat_template = "chatml": the tokenizer has no special token {missing[0]}; "zephyr", which '
            "needs the end token alone, or the path of a template is accepted"
        )
    return ChatTemplate(BUILT_IN[name], {"eos_token": eos_token}, special_tokens, f'tokenizer.chat_template = "{name}"')


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " …"
