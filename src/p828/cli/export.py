"""`p828 export`: a trained model as a directory that transformers loads, or as a file that llama.cpp runs."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from p828.cli.flags import parse
from p828.cli.output import loading_pytorch
from p828.config.rules import check_path
from p828.errors import ConfigError, warn
from p828.interchange.architectures.own import OWN
from p828.interchange.hub import check_push, push
from p828.train.log.console import waiting

SUFFIX = ".gguf"  # of a file for llama.cpp
USAGE = "p828 export CHECKPOINT DIR|FILE.gguf [--dtype DTYPE] [--native-only] [--push REPO]"
DESCRIPTION = (
    f"{USAGE}\n\nDIR gets the weights, config.json, the tokenizer, a model card and the training configuration: "
    "AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load it. FILE.gguf gets model and "
    "tokenizer for llama.cpp. Nothing leaves this machine without --push."
)


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's directory, for its newest checkpoint, or one checkpoint's."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR|FILE.gguf")]
    """Directory to write, which is new or empty; or a new file whose name ends in .gguf."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the matrices; router, balance bias, norms and sinks stay float32, as in training. float16 is for .gguf."""
    native_only: bool = False
    """Refuse a model that would need code of its own, which is loaded with trust_remote_code."""
    push: Annotated[str, tyro.conf.arg(metavar="REPO")] = ""
    """Upload it to this repository of the hub (NAME/MODEL), which is made, and is private, if it is not there."""


def run(arguments: list[str]) -> None:
    given = parse(Arguments, arguments, prog="p828 export", description=DESCRIPTION)
    check_path("CHECKPOINT", given.checkpoint)
    check_path("DIR|FILE.gguf", given.target)
    if given.push or any(argument.partition("=")[0] == "--push" for argument in arguments):
        check_push(given.push)
    target = Path(given.target)
    lines = _to_file(given, target) if given.target.lower().endswith(SUFFIX) else _to_directory(given, target)
    print("\n".join(lines), flush=True)
    if given.push:
        with waiting(f"pushing to {given.push}", warn):
            address = push(target, given.push)
        print(f"pushed to      {address}", flush=True)


def _to_directory(given: Arguments, directory: Path) -> list[str]:
    if given.dtype == "float16":
        raise ConfigError(
            f"--dtype float16: accepted for a file whose name ends in {SUFFIX}; float32 or bfloat16 is, too"
        )
    with loading_pytorch():
        from p828.interchange.export import export_model
    with waiting(f"exporting to {directory}", warn):
        found = export_model(given.checkpoint, directory, given.dtype, given.native_only)
    files = "1 file" if len(found.weights) == 1 else f"{len(found.weights)} files"
    text = json.dumps(str(found.directory), ensure_ascii=False)  # also a text of Python
    trust = ", trust_remote_code=True" if found.architecture is OWN else ""
    return [
        f"checkpoint     {found.checkpoint} (step {found.step})",
        f"exported as    {found.architecture.model_type}" + (", with code of its own" if trust else ""),
        f"weights        {given.dtype}, {found.bytes / 1e6:,.1f} MB in {files}",
        f"load it with   AutoModelForCausalLM.from_pretrained({text}{trust})",
    ]


def _to_file(given: Arguments, file: Path) -> list[str]:
    if given.native_only:
        raise ConfigError(f"--native-only: accepted for a directory; a {SUFFIX} file never has code of its own")
    with loading_pytorch():
        from p828.interchange.gguf import export_gguf
    with waiting(f"exporting to {file}", warn):
        found = export_gguf(given.checkpoint, file, given.dtype)
    return [
        f"checkpoint     {found.checkpoint} (step {found.step})",
        f"exported as    {found.architecture} of llama.cpp",
        f"weights        {given.dtype}, {found.bytes / 1e6:,.1f} MB",
        f"run it with    llama-completion -m {shlex.quote(str(file))} -no-cnv -p TEXT",
    ]
