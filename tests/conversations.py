"""Invented conversations, and runs on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chat_templates import Messages, talk
from p828.config import Config, from_dict
from runs import tiny_values

NAMES = ["Ka", "Ri", "To", "Mu", "Ne", "Sa"]
COLOURS = ["red", "blue", "green"]


def colours(count: int = 36) -> list[Messages]:
    """Everyone has a colour, which the assistant is asked for; some are asked for two in turn."""
    found = []
    for number in range(count):
        first, second = NAMES[number % 6], NAMES[(number * 5 + 1) % 6]
        asked = talk(f"{first}?", COLOURS[NAMES.index(first) % 3], f"And {second}?", COLOURS[NAMES.index(second) % 3])
        found.append(asked if number % 2 else asked[:2])
    return found


def write_conversations(path: Path, conversations: Sequence[Messages], field: str = "messages") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: messages}) + "\n" for messages in conversations))
    return path


def chat_values(tmp_path: Path) -> dict[str, Any]:
    """`runs.tiny_values` for conversations, all of which are trained on and validated on."""
    path = str(write_conversations(tmp_path / "talk.jsonl", colours()))
    values = tiny_values(tmp_path)
    values["data"] = {
        "source": "files", "files": [path], "messages_field": "messages", "sequence_length": 48, "shuffle_rows": 8,
        "validation": {"kind": "files", "files": [path]},
    }  # fmt: skip
    values["evaluation"] = {"every": 0, "rows": 100}
    return values


def chat_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    values = chat_values(tmp_path)
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return from_dict({"name": "chat", "runs_dir": str(tmp_path / "runs"), **values}, "chat")
