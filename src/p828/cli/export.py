"""`p828 export`: a trained model as a directory that transformers loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from p828.cli.flags import parse
from p828.config.rules import check_text
from p828.errors import warn
from p828.interchange.export import Export, export_model
from p828.train.console import waiting

USAGE = "p828 export CHECKPOINT DIR [--dtype float32|bfloat16] [--native-only] [--push REPO]"
DESCRIPTION = (
    f"{USAGE}\n\nDIR gets the weights, config.json, the tokenizer, a model card and the training configuration: "
    "AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load it. Nothing leaves this machine "
    "without --push."
)


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Directory to write, which is new or empty."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrices; router, balance bias, norms and sinks stay float32, as in training."""
    native_only: bool = False
    """Refuse a model that would need code of its own, which is loaded with trust_remote_code."""
    push: Annotated[str, tyro.conf.arg(metavar="REPO")] = ""
    """Upload DIR to this repository of the hub (NAME/MODEL)."""


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 export", description=DESCRIPTION)
    check_text("CHECKPOINT", given.checkpoint)
    check_text("DIR", given.directory)
    directory = Path(given.directory)
    with waiting(f"exporting to {directory}", warn):
        found = export_model(given.checkpoint, directory, given.dtype, given.native_only)
    print("\n".join(_lines(found, given.dtype)), flush=True)
    if given.push:
        from p828.interchange.hub import push

        print(f"pushed to      {push(directory, given.push)}", flush=True)


def _lines(found: Export, dtype: str) -> list[str]:
    files = "1 file" if len(found.weights) == 1 else f"{len(found.weights)} files"
    call = f'AutoModelForCausalLM.from_pretrained("{found.directory}"'
    return [
        f"checkpoint     {found.checkpoint} (step {found.step})",
        f"exported as    {found.architecture.model_type}",
        f"weights        {dtype}, {found.bytes / 1e6:,.1f} MB in {files}",
        f"load it with   {call})",
    ]
