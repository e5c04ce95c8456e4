"""What the tests of `p828 export` share."""

from typing import Any

NATIVE: dict[str, Any] = {"attention_sinks": False}
FILES = {
    "README.md", "config.json", "config.toml", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip
