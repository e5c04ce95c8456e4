"""Answer messages: a conversation as the run's chat template writes it, continued up to the end of the turn."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from p828.config.values import shown
from p828.data.tokenizer.chat_template import ChatTemplate, Messages, TemplateFailed
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import ConfigError
from p828.inference.generate import Completion, OnText, continued
from p828.inference.load import LoadedModel
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Sequence[Messages],
    config: SamplingConfig,
    on_text: OnText = lambda index, text: None,
    dtype: torch.dtype = torch.float32,
) -> list[Completion]:
    """What the assistant says next in each conversation, as `generate` continues a prompt.

    Raises ConfigError as `generate` does, for a tokenizer without a chat template, and for messages that the template
    refuses.
    """
    questions = [question(tokenizer, messages) for messages in conversations]
    texts, ids = [text for text, _ in questions], [tokens for _, tokens in questions]
    return continued(model, tokenizer, texts, ids, ending(tokenizer, config), on_text, dtype, tokenizer.end_ids)


def question(tokenizer: Tokenizer, messages: Messages) -> tuple[str, list[int]]:
    """The text before the assistant's answer, as the chat template marks it, and its tokens. Raises as `answer`."""
    text = prompt_of(template_in(tokenizer), messages)
    ids: list[int] = tokenizer.encode_marked([text])[0]["id"].tolist()
    return text, ids


def ending(tokenizer: Tokenizer, config: SamplingConfig) -> SamplingConfig:
    """`config` with the text that ends an answer where no token does. Raises ConfigError without a chat template."""
    template = template_in(tokenizer)
    if not template.end_of_turn or template.end_token:
        return config
    return replace(config, stop=(*config.stop, template.end_of_turn))


def answer_one(loaded: LoadedModel, messages: str | Messages, sampling: SamplingConfig) -> str:
    """What a run's assistant says next, to a user's message or in a conversation. Raises ConfigError as `answer`."""
    conversation = asked([messages])[0] if isinstance(messages, str) else messages
    if not isinstance(conversation, list | tuple) or not all(isinstance(message, dict) for message in conversation):
        raise ConfigError(
            f"messages = {shown(messages)}: a text, or a list of objects with role and content, is accepted"
        )
    (completion,) = answer(loaded.model, loaded.tokenizer, [list(conversation)], sampling, dtype=loaded.dtype)
    return completion.text


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens before the answer to a user's message. Raises ConfigError."""
    return question(tokenizer, asked([prompt])[0])[1]


def asked(prompts: Sequence[str]) -> list[Messages]:
    """Each prompt as a user's message in a conversation of its own."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def template_in(tokenizer: Tokenizer) -> ChatTemplate:
    """Raises ConfigError if it has none."""
    if tokenizer.template is None:
        raise ConfigError("the run has no chat template: it was not trained on conversations")
    return tokenizer.template


def prompt_of(template: ChatTemplate, messages: Messages) -> str:
    """Marked text. Raises ConfigError for messages that the template refuses."""
    try:
        return template.prompt(messages)
    except TemplateFailed as error:
        raise ConfigError(f"{template.where}: the chat template refuses the messages: {error}") from None
