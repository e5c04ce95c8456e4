"""Imports go one way, and nothing heavy comes in with a module that does not need it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import p828

ROOT = Path(p828.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Package or module directly under p828 -> what of p828 it may import besides itself.
BOTTOM = {"errors", "config", "config_checks", "config_files", "config_values", "files"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors", "config_checks", "config_files", "config_values"},
    "config_files": {"errors", "files", "config_checks", "config_values"},
    "config_values": {"errors"},
    "config_checks": {"errors", "config_values", "config"},  # the last for the types alone
    "kernels": BOTTOM,
    "model": BOTTOM | {"kernels"},
    "data": BOTTOM | {"kernels"},
    "inference": BOTTOM | {"kernels", "model", "data", "train"},  # peers: one reads the other's checkpoints,
    "train": BOTTOM | {"kernels", "model", "data", "inference"},  # the other samples and evaluates while it trains
    "bench": BOTTOM | {"kernels", "model", "data", "inference", "train"},
    "cli": BOTTOM | {"kernels", "model", "data", "inference", "train", "bench"},
    "__main__": {"cli"},
    "__init__": set(),
}
INSIDE_FUNCTIONS_ONLY = {"datasets", "wandb", "huggingface_hub", "transformers", "torchtitan", "deepspeed"}


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full dotted names; `from p828 import config` counts as p828.config."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            if node.module == "p828":
                yield from (f"p828.{alias.name}" for alias in node.names)
            else:
                yield node.module


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_every_package_has_its_place() -> None:
    assert FILES
    top = {name(file).split("/")[0].removesuffix(".py") for file in FILES}
    assert top <= set(MAY_IMPORT)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_one_way(file: Path) -> None:
    own = name(file).split("/")[0].removesuffix(".py")
    for module in imported(ast.walk(parse(file))):
        parts = module.split(".")
        if parts[0] == "p828" and parts[1:] and parts[1] != "__version__":
            assert parts[1] == own or parts[1] in MAY_IMPORT[own], f"{name(file)} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_heavy_packages_are_imported_where_they_are_needed(file: Path) -> None:
    heavy = {module.split(".")[0] for module in imported(outside_functions(parse(file)))} & INSIDE_FUNCTIONS_ONLY
    assert not heavy


@pytest.mark.parametrize("file", FILES, ids=name)
def test_deepspeed_stays_in_the_engine(file: Path) -> None:
    modules = {module.split(".")[0] for module in imported(ast.walk(parse(file)))}
    assert "deepspeed" not in modules or name(file).startswith("train/engine")


@pytest.mark.parametrize("package", ["model", "kernels"])
def test_model_and_kernels_are_plain_tensor_math(package: str) -> None:
    """No ranks, no files, no logs."""
    allowed = {"torch", "math", "typing", "collections", "p828", "triton", "dataclasses", "functools"}
    for file in (ROOT / package).rglob("*.py"):
        modules = set(imported(ast.walk(parse(file))))
        assert {module.split(".")[0] for module in modules} <= allowed, name(file)
        assert not any(module.startswith("torch.distributed") for module in modules), name(file)
