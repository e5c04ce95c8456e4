"""Chat templates in the styles of those in use, written for the tests, and conversations for them."""

from typing import Any

Messages = list[dict[str, Any]]

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<s>", "</s>", "[INST]", "[/INST]", "<|begin|>", "<|eot|>",
    "<|start_header|>", "<|end_header|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip

# Qwen 2.5: a system message of its own where none is given, white space taken off by the tags.
QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Qwen 3: the reasoning is written for answers behind the last question alone.
QWEN_THINKING = """\
{%- set ns = namespace(last_query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.found = true %}
        {%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and loop.index0 > ns.last_query %}
        {{- '<|im_start|>assistant\\n<think>\\n' + message.reasoning_content|default('') + '\\n</think>\\n\\n' }}
        {{- message.content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Llama 3: a date, content without white space around it, blocks whose lines are trimmed.
LLAMA = """\
{{- bos_token }}
{% set today = strftime_now("%d %b %Y") %}
{{- "<|start_header|>system<|end_header|>\\n\\nToday is " + today + "<|eot|>" }}
{% for message in messages %}
    {% if message.tool_calls is defined %}
        {{- "<|start_header|>assistant<|end_header|>\\n\\n" + message.tool_calls | tojson(indent=1) + "<|eot|>" }}
    {% else %}
        {{- "<|start_header|>" + message["role"] + "<|end_header|>\\n\\n" + message["content"] | trim + "<|eot|>" }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{- "<|start_header|>assistant<|end_header|>\\n\\n" }}
{%- endif %}
"""
# Mistral: roles have to alternate, and nothing tells an answer's beginning but the end of the question.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Gemma: another name for a role, and `continue` from jinja's loop controls.
GEMMA = """\
{{ bos_token }}
{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
# Phi 3: tokens that are put together from a role.
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Text alone: the end of an answer is a blank line.
PLAIN = """\
{% for message in messages %}
{{ message.role | upper + ': ' + message.content + '\\n\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}
"""
TEMPLATES = {
    "qwen": QWEN, "qwen_thinking": QWEN_THINKING, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "phi": PHI,
    "plain": PLAIN,
}  # fmt: skip
# Qwen's again, with what the assistant says between transformers' tags.
WITH_TAGS = """\
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def talk(*contents: str) -> Messages:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    talk("The cat?", "It sat on the mat."),
    talk(" \n two  spaces\t", "  def f(x):\n    return 12\n\n", "naïve 数据 🙂?", "don't <p>tags</p> [1]"),
    talk("", "\nyes", "More, and more.", "no", "And?", "한국어 \u0301 units & {{ messages }} {% if %}"),
]
