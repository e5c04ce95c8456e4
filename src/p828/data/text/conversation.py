"""A conversation in a JSON object or hub row: checked, and made marked text by the chat template."""

from p828.data.text.shard import BadRecord
from p828.data.tokenizer.chat_template import ChatTemplate, Messages, TemplateFailed
from p828.errors import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
LONGEST_SHOWN = 80  # characters of what was given


def conversation_of(fields: object, messages_field: str, template: ChatTemplate, where: str, record: int) -> str:
    """Marked text of the conversation in `fields`. Raises BadRecord naming the place and what is wrong."""
    try:
        return template.marked(_messages(fields, messages_field))
    except TemplateFailed as error:
        raise BadRecord(f"{where}: the chat template refuses it: {error}", record) from None
    except ValueError as error:
        raise BadRecord(f"{where}: {error}", record) from None


def _messages(fields: object, messages_field: str) -> Messages:
    """Raises ValueError saying what is wrong."""
    key = f"{messages_field!r} (data.messages_field)"
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object with the field {messages_field!r} is accepted, not {type(fields).__name__}")
    if messages_field not in fields:
        raise ValueError(f"no field {key}; fields here: {', '.join(map(str, fields))[:200] or 'none'}")
    checked = messages_of(fields[messages_field], key)
    if all(message["role"] != "assistant" for message in checked):
        raise ValueError("no message is the assistant's, so there is nothing to learn to say")
    return checked


def messages_of(value: object, key: str) -> Messages:
    """The messages of a field, each checked by itself. Raises ValueError saying what is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {key} holds {_named(value)}: a list of messages is accepted")
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def _message(message: object, number: int) -> dict[str, object]:
    """The message without the keys that hold null, as transformers hands it to a template."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {_named(message)}: an object with role and content is accepted")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if role not in ROLES:
        spelled = ", as " + " and ".join(f"{key!r}" for key in given) if "role" not in given and given else ""
        what = f"no role{spelled}" if "role" not in given else f"the role {str(role)[:LONGEST_SHOWN]!r}"
        near = did_you_mean(role, ROLES) if isinstance(role, str) else "."
        raise ValueError(f"message {number} has {what}: {', '.join(ROLES)} are accepted{near}")
    content = given.get("content", "")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: content is {_named(content)}: text is accepted")
    if role == "assistant" and not content.strip() and not given.get("tool_calls"):
        raise ValueError(f"message {number}: the assistant says nothing")
    if "content" not in given and role != "assistant":
        raise ValueError(f"message {number} ({role}) has no content")
    return {**given, "content": content}


def _named(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", type(None): "null", bool: "true or false"}
    kind = names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
    return f"{kind} without entries" if value in ([], {}) else kind
