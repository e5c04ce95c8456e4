"""The text that the proof's runs train on: this interpreter's own standard library, cut into short documents."""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from p828.cli.main import dispatch
from p828.config import Config, DataConfig, TokenizerConfig
from p828.data.build import tokenizer_of

MEGABYTES = 4  # of code; the prose in it is a sixth of that
FEW = 200  # documents, which a run goes through three times
VOCABULARY = 512
SEQUENCE = 64
SHORTEST, LONGEST = 200, 3000  # characters of a document


def write_corpus(directory: Path, megabytes: int = MEGABYTES, is_prepared: bool = True) -> Path:
    """Four .jsonl files, `tokenizer.json` and `prepared/`, unless they are there."""
    if (directory / "tokenizer.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    code, prose, talk = [], [], []
    for name, text, docstring in _definitions(megabytes * 2**20):
        code.append({"text": text})
        if len(docstring) > SHORTEST // 2:
            prose.append({"text": docstring})
            asked = {"role": "user", "content": f"What is {name}?"}
            answer = docstring[: len(docstring) // 3]  # of many lengths, so that rows differ in their targets
            talk.append({"messages": [asked, {"role": "assistant", "content": answer}]})
    for name, lines in (("code", code), ("few", code[:FEW]), ("prose", prose), ("talk", talk)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(source="files", files=(str(directory / "code.jsonl"),), sequence_length=SEQUENCE)
    tokenizer = TokenizerConfig(vocab_size=VOCABULARY, training_megabytes=1)
    tokenizer_of(Config(data=data, tokenizer=tokenizer)).save(directory / "tokenizer.json")
    if is_prepared:
        _prepare(directory)
    return directory


def _prepare(directory: Path) -> None:
    config = {
        "data": {**files(directory, "code"), "prepared": str(directory / "prepared")},
        "tokenizer": {"name": str(directory / "tokenizer.json")},
    }
    path = directory / "prepare.toml"
    path.write_text(tomli_w.dumps(config))
    assert dispatch(["prepare", str(path)]) == 0


def files(directory: Path, name: str) -> dict[str, Any]:
    """The keys of a data section for one of the files."""
    return {"source": "files", "files": [str(directory / f"{name}.jsonl")], "sequence_length": SEQUENCE}


def _definitions(size: int) -> Iterator[tuple[str, str, str]]:
    """Name, text and docstring of functions and classes, in a fixed random order of the modules, up to `size`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(0).shuffle(paths)
    total, texts = 0, set[str]()
    for path in paths:
        try:
            source = path.read_text()
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # tests of the library's own parser
            continue
        lines = source.splitlines(keepends=True)
        for node in _parts(tree):
            text = "".join(lines[node.lineno - 1 : node.end_lineno])
            if SHORTEST <= len(text) <= LONGEST and text not in texts:
                texts.add(text)
                total += len(text)
                yield node.name, text, ast.get_docstring(node) or ""
        if total > size:
            return


def _parts(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes, none of which is in another one; of a class that is too long its methods."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno > LONGEST // 40:
            yield from _parts(node)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
