"""`tokenizer_config.json` beside a tokenizer.json: its chat template, as transformers writes and reads it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p828.config import TokenizerConfig
from p828.data.tokenizer import template_trial
from p828.data.tokenizer.chat_template import BUILT_IN, MARKER, ChatTemplate, built_in
from p828.errors import ConfigError, did_you_mean, reason
from p828.files import MEBIBYTE, read_limited, write_atomic

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"  # where newer versions of transformers write the template
LARGEST_CONFIG, LARGEST_TEMPLATE = 64 * MEBIBYTE, MEBIBYTE
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What templates know by a name. The end token is the run's, whatever the tokenizer's settings say."""
CHATML_TOKENS = set(MARKER.findall(BUILT_IN["chatml"]))


def template_of_trained(config: TokenizerConfig, is_chat: bool) -> ChatTemplate | None:
    """The template of a tokenizer that is yet to be trained; None if it needs none.

    The markers that it spells, as <|im_end|>, are to be special tokens. Raises ConfigError as `template_for`.
    """
    name = config.chat_template or ("chatml" if is_chat else "")
    if not name:
        return None
    special_tokens = sorted({config.eos_token, *MARKER.findall(BUILT_IN.get(name) or _read_given(name))})
    return _given(name, config.eos_token, special_tokens, {})


def template_for(
    config: TokenizerConfig, special_tokens: Sequence[str], directory: Path | None, is_chat: bool
) -> ChatTemplate | None:
    """The template for a tokenizer that is there: the given one, or for conversations its own, or a built-in one.

    `directory` holds what belongs to the tokenizer, if anything does. Raises ConfigError naming a file that is none.
    """
    if config.chat_template:
        variables = {} if directory is None else _read_config(directory / TOKENIZER_CONFIG_FILE)
        return _given(config.chat_template, config.eos_token, special_tokens, _named_tokens(variables))
    if not is_chat:
        return None
    own = None if directory is None else read_template(directory, special_tokens, config.eos_token)
    if own is not None:
        own.check()
        return own
    return built_in("chatml" if CHATML_TOKENS.issubset(special_tokens) else "zephyr", config.eos_token, special_tokens)


def read_template(
    directory: Path, special_tokens: Sequence[str], eos_token: str, is_foreign: bool = False
) -> ChatTemplate | None:
    """The template that lies beside a tokenizer.json, if one does; one `is_foreign` is tried out first.

    Raises ConfigError naming a file that is none.
    """
    path = directory / TOKENIZER_CONFIG_FILE
    values = _read_config(path)
    source = values.get("chat_template")
    if isinstance(source, list):  # several, by name
        by_name = {str(one.get("name")): one.get("template") for one in source if isinstance(one, dict)}
        source = by_name.get("default", next(iter(by_name.values()), None))
    if (directory / TEMPLATE_FILE).exists():
        path = directory / TEMPLATE_FILE
        source = _read_text(path, LARGEST_TEMPLATE)
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > LARGEST_TEMPLATE:
        raise ConfigError(f"{path}: chat_template is no template: a text of at most a megabyte is accepted")
    make = template_trial.tried if is_foreign else ChatTemplate
    return make(source, {**_named_tokens(values), "eos_token": eos_token}, special_tokens, str(path))


def config_json(template: ChatTemplate) -> str:
    """What `read_template` and transformers' AutoTokenizer read."""
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **template.variables, "chat_template": template.source}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def save_template(directory: Path, template: ChatTemplate) -> None:
    """Raises ConfigError when it cannot be written."""
    path = directory / TOKENIZER_CONFIG_FILE
    try:
        write_atomic(path, config_json(template))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error


def _given(name: str, eos_token: str, special_tokens: Sequence[str], variables: dict[str, str]) -> ChatTemplate:
    """What `tokenizer.chat_template` names."""
    if name in BUILT_IN:
        return built_in(name, eos_token, special_tokens)
    given = ChatTemplate(_read_given(name), {**variables, "eos_token": eos_token}, special_tokens, name)
    given.check()
    return given


def _read_given(name: str) -> str:
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(
            f"tokenizer.chat_template = {name!r}: {', '.join(BUILT_IN)} or the path of a template is accepted"
            f"{did_you_mean(name, BUILT_IN)}"
        )
    return _read_text(path, LARGEST_TEMPLATE)


def _read_text(path: Path, most: int) -> str:
    try:
        return read_limited(path, most).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a chat template: {reason(error)}") from None


def _read_config(path: Path) -> dict[str, Any]:
    """The file's values; none if there is no such file. Raises ConfigError."""
    if not path.exists():
        return {}
    try:
        values = json.loads(read_limited(path, LARGEST_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a JSON object is accepted, not {type(values).__name__}")
    return values


def _named_tokens(values: dict[str, Any]) -> dict[str, str]:
    """The tokens that have a name; each is a text, or an object with its content."""
    found = {}
    for name in NAMED_TOKENS:
        token = values.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found
