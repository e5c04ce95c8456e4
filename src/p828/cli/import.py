"""`p828 import`: a model of other libraries as a run, which the other commands take."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from p828.cli.flags import parse
from p828.cli.output import loading_pytorch
from p828.config.rules import check_name, check_path
from p828.errors import warn
from p828.interchange.hub_directory import READABLE
from p828.model.costs import count_parameters
from p828.train.log.console import waiting

if TYPE_CHECKING:
    from p828.interchange.origin import Origin

USAGE = "p828 import DIR [--name NAME] [--runs-dir RUNS]"
DESCRIPTION = (
    f"{USAGE}\n\nDIR holds config.json, tokenizer.json and model.safetensors (or several, with their index), as "
    f"save_pretrained and p828 export write them. Architectures: {', '.join(READABLE)}. The run has a checkpoint of "
    "weights alone: generate, evaluate and export take it, and so does a new run with --train.init-from."
)


@dataclass(frozen=True)
class Arguments:
    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Directory of a model in the hub's layout."""
    name: str = ""
    """The run's name; empty means the directory's."""
    runs_dir: str = "runs"
    """Directory that holds the runs."""


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 import", description=DESCRIPTION)
    check_path("DIR", given.directory)
    check_path("--runs-dir", given.runs_dir)
    directory = Path(given.directory)
    name = given.name or Path(os.path.abspath(directory)).name
    check_name(name)
    with loading_pytorch():
        from p828.interchange.origin import read_hub_origin
        from p828.train.weights_only import write_run
    with waiting(f"reading {directory}", warn):
        origin = read_hub_origin(directory)
    with waiting("copying the weights", warn):
        path = write_run(origin, name, given.runs_dir)
    print("\n".join(_lines(origin, path)), flush=True)


def _lines(origin: "Origin", path: Path) -> list[str]:
    parameters = count_parameters(origin.config.model)
    word = shlex.quote(str(path))
    chat = "" if origin.tokenizer.template is None else " --chat"
    return [
        f"imported       {origin.path} (step {origin.step})",
        f"model          {parameters.total:,} parameters, {parameters.active:,} active for a token",
        f"run            {path}",
        f"try it         p828 generate {word} --prompt TEXT{chat}",
        f"train it on    p828 train {word} --name NEW --train.init-from {word} --data.files FILE",
    ]
