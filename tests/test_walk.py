"""docs/walk.md names files and functions that exist, each beside one that calls it or that it calls."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import p828

SOURCE = Path(p828.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "walk.md"
ROW = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
TEXT, PREPARED = "Text to loss", "Prepared data to loss"


class Hop(NamedTuple):
    file: str
    name: str


def sections() -> dict[str, list[Hop]]:
    title_and_text = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        title: [Hop(*row) for row in ROW.findall(text)]
        for title, text in zip(title_and_text[::2], title_and_text[1::2], strict=True)
    }


WALKS = sections()


def definition(hop: Hop) -> ast.AST:
    """The class or function of that dotted name. Raises AssertionError if the file has none."""
    path = SOURCE / hop.file
    assert path.is_file(), f"docs/walk.md: there is no {hop.file}"
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in hop.name.split("."):
        found = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == part
        ]
        assert found, f"docs/walk.md: {hop.file} has no {hop.name}"
        node = found[0]
    return node


def uses(caller: ast.AST, called: Hop) -> bool:
    """Whether the caller's body has the name by which the function is called.

    A name is all that can be seen without types: `self.order` may be any iterator. It is enough to find a hop that has
    moved, or was renamed.
    """
    name = called.name.rpartition(".")[2]
    nodes = list(ast.walk(caller))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    if name == "__next__":
        return "next" in names or any(isinstance(node, ast.For | ast.comprehension) for node in nodes)
    if name in ("__call__", "forward"):  # called by the name of an attribute that holds the object
        return any(isinstance(node, ast.Call) for node in nodes)
    return name in names


@pytest.mark.parametrize("title", WALKS)
def test_each_hop_exists_beside_one_that_calls_it(title: str) -> None:
    hops = WALKS[title]
    assert len(hops) > 3, title
    nodes = [definition(hop) for hop in hops]
    for number in range(1, len(hops)):
        earlier = range(number)
        is_joined = any(uses(nodes[other], hops[number]) or uses(nodes[number], hops[other]) for other in earlier)
        assert is_joined, f"docs/walk.md: {title}: {hops[number]} neither calls an earlier one nor is called by one"


def test_text_becomes_a_loss_in_14_files_and_prepared_data_in_11() -> None:
    text, prepared = WALKS[TEXT], WALKS[PREPARED]
    from_the_loader_on = text[text.index(prepared[-1]) :]
    assert len({hop.file for hop in text}) <= 14
    assert len({hop.file for hop in (*prepared, *from_the_loader_on)}) <= 11


def test_every_path_in_the_text_is_there() -> None:
    """Also where the architecture names one; `folder/` and `file.py` from src/p828 on."""
    for page in (PAGE, PAGE.with_name("architecture.md")):
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.py)`", text):
            roots = (SOURCE, PAGE.parents[1])
            assert any((root / path).is_file() for root in roots), f"{page.name}: there is no {path}"
