"""How much an answer took, and why it ended, in the words of OpenAI's API."""

from collections.abc import Sequence

from p828.inference.decode.sequence import FinishReason
from p828.serve.api.choice import Choice, Prompt

FINISH_REASONS: dict[FinishReason, str] = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


def usage_of(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens: of a prompt once, however many answers it has; of answers all that were made, the ending one too."""
    read, made = sum(len(prompt.ids) for prompt in prompts), sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
