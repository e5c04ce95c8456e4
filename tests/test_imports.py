"""Imports go one way, and nothing heavy comes in with a module that does not need it."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import p828

ROOT = Path(p828.__file__).parent
# An export carries these files, and transformers runs them from there without p828.
CARRIED = sorted((ROOT / "interchange" / "architectures" / "remote_code").glob("*_p828.py"))
FILES = sorted({*ROOT.rglob("*.py")} - {*CARRIED})

# The packages and modules directly under p828, bottom up: each may import those before it, and itself.
LAYERS = [
    "errors", "files", "config", "kernels", "model", "system", "data", "runs", "distributed", "inference",
    "serve", "interchange", "optim", "health", "engine", "plan", "report", "train", "verify", "bench", "doctor", "api",
    "cli", "__main__",
]  # fmt: skip
INSIDE_FUNCTIONS_ONLY = {
    "datasets", "wandb", "huggingface_hub", "transformers", "torchtitan", "deepspeed", "gguf", "lm_eval", "tensorboard",
    "trackio",
}  # fmt: skip


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
    assert {layer(file) for file in FILES} == {*LAYERS, "__init__"}


def layer(file: Path) -> str:
    return name(file).split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_down(file: Path) -> None:
    own = layer(file)
    below = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else ["api"]
    for module in imported(ast.walk(parse(file))):
        parts = module.split(".")
        if parts[0] == "p828" and parts[1:] and parts[1] != "__version__":
            assert parts[1] in below, f"{name(file)} imports {module}"


def test_no_circle_of_imports() -> None:
    """Not even between two files of a folder, or through an import inside a function."""
    modules = {".".join(("p828", *file.relative_to(ROOT).with_suffix("").parts)): file for file in FILES}
    graph = {
        module: {found for found in imported_modules(file) if found in modules and found != module}
        for module, file in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def imported_modules(file: Path) -> Iterator[str]:
    """As `imported`, with `from p828.runs import checkpoint` as p828.runs.checkpoint."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_heavy_packages_are_imported_where_they_are_needed(file: Path) -> None:
    heavy = {module.split(".")[0] for module in imported(outside_functions(parse(file)))} & INSIDE_FUNCTIONS_ONLY
    assert not heavy


@pytest.mark.parametrize("file", FILES, ids=name)
def test_deepspeed_stays_in_the_engine(file: Path) -> None:
    modules = {module.split(".")[0] for module in imported(ast.walk(parse(file)))}
    assert "deepspeed" not in modules or name(file).startswith("engine/deepspeed/")


def test_a_command_without_its_arguments_is_answered_without_pytorch() -> None:
    """PyTorch takes seconds to import. Each command is called with nothing, in one process for all."""
    program = "\n".join([
        "import sys",
        "from p828.cli.main import dispatch",
        "for command in sys.argv[1:]:",
        "    code = dispatch([command])",
        "    print(command, code, 'torch' in sys.modules)",
    ])  # fmt: skip
    commands = ["train", "plan", "prove-resume", "prepare", "serve", "generate", "evaluate", "import", "export"]
    done = subprocess.run([sys.executable, "-c", program, *commands], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{command} 2 False" for command in commands], done.stderr


@pytest.mark.parametrize("file", CARRIED, ids=name)
def test_carried_files_need_no_p828(file: Path) -> None:
    """They import one another relatively, and what transformers itself installs or needs."""
    allowed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "packaging",
        "typing",
        "collections",
        "dataclasses",
        "importlib",
    }
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert f"{node.module}.py" in {carried.name for carried in CARRIED}
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] in allowed


@pytest.mark.parametrize("package", ["model", "kernels"])
def test_model_and_kernels_are_plain_tensor_math(package: str) -> None:
    """No ranks, no files, no logs."""
    allowed = {"torch", "math", "typing", "collections", "p828", "triton", "dataclasses", "functools"}
    if package == "kernels":
        allowed.add("ctypes")  # for the driver
    for file in (ROOT / package).rglob("*.py"):
        modules = set(imported(ast.walk(parse(file))))
        assert {module.split(".")[0] for module in modules} <= allowed, name(file)
        assert not any(module.startswith("torch.distributed") for module in modules), name(file)
