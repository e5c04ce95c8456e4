import gzip
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

from p828.config import Config
from p828.data.loader import Loader, open_loader
from p828.data.tokenizer.tokenizer import Tokenizer

WORDS = (
    "def",
    "return",
    "self",
    "import",
    "for",
    "in",
    "läuft",
    "数据",
    "=",
    "(",
    "):",
    "12",
    "#",
    "\n\n",
    "\n  ",
    "",
    "",
)


def open_run_loader(config: Config, tokenizer: Tokenizer, **options: Any) -> Loader:
    return open_loader(config.data, config.train, tokenizer, config.model.mask_documents, **options)


def text(seed: int, words: int = 60) -> str:
    """A text of its own: it begins with its number."""
    draw = random.Random(seed)
    return f"document {seed}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, words)))


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    data = "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()
    write_bytes(path, data)
    return path


def write_bytes(path: Path, data: bytes) -> None:
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress.get(path.suffix, bytes)(data))
