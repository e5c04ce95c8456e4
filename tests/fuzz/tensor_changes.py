"""Changes of a checkpoint's tensors at random, with checksums that are right again; and, as a program, resumes of them.

`python tensor_changes.py CONFIG RUNS_DIR SEED COUNT [FLAGS]` changes the one checkpoint of the run `tiny` in RUNS_DIR
and resumes it, COUNT times, each in a fork of this process, as DeepSpeed can be set up once in one. A line of JSON on
each goes to standard output: the change, the exit code (below 0 a signal), and what was said on standard error.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from hostile import places
from torch import Tensor

from p828.cli.main import dispatch
from p828.runs import checkpoint
from p828.runs.file_names import CHECKPOINTS, MANIFEST_FILE, name_of
from p828.runs.manifest import describe, manifest_bytes
from p828.runs.tensors import TensorShard, part_of, write_tensors

STEP = 3
PARTS = ("model", "optimizer", "random")
NAMES = ["", "a", "..", "/", "\0", "\n", "x" * 3000, "\ud800", "model.layers.9.norm.weight", "__metadata__", "cpu/1"]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
NUMBERS = [float("nan"), float("inf"), -1.0, 0.0, 0.5, 1e38, 2.0**24]
IN_HEADERS = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1.5, "", "F32", "F16", "BF16", "I32", "U8", "F8_E4M3", "BOOL",
    "x" * 5000, [], [0], [-1], [2**40, 2**40], {}, {"": []}, [[]],
]  # fmt: skip


def change(path: Path, draw: random.Random) -> str:
    """Change the files of the checkpoint at `path` and make its manifest agree; in words, how."""
    how = _change_header(path, draw) if draw.random() < 0.4 else _change_tensors(path, draw)
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    del manifest["sha256"]
    files = sorted(file.name for file in path.iterdir() if file.name != MANIFEST_FILE)
    manifest["files"] = {name: describe(path / name) for name in files}
    (path / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))
    return how


def _change_tensors(path: Path, draw: random.Random) -> str:
    part = draw.choice(PARTS)
    values: dict[str, Any] = dict(checkpoint.load(path, [part]).tensors[part])
    how = []
    for _ in range(draw.randint(1, 2)):
        how.append(_change_one(values, draw))
    if draw.random() < 0.1:
        how.append("no file")
        (path / f"{part}.safetensors").unlink()
        return f"{part}: {', '.join(how)}"
    (path / f"{part}.safetensors").unlink()
    file = draw.choice([f"{part}.safetensors"] * 5 + [f"{part}.rank_0001.safetensors", "other.safetensors"])
    write_tensors(path / file, values)
    return f"{file}: {', '.join(how)}"


def _change_one(values: dict[str, Any], draw: random.Random) -> str:
    """Change, add, rename or remove one tensor or shard."""
    name = draw.choice(list(values) or ["a"])
    tensor: Tensor = values.get(name, torch.ones(2))
    tensor = tensor.values if isinstance(tensor, TensorShard) else tensor
    match draw.randrange(9):
        case 0:
            values.pop(name, None)
            return f"{name} gone"
        case 1:
            new = draw.choice([name_ for name_ in NAMES if name_ not in ("\ud800", "__metadata__")] + list(values))
            values[new] = values.pop(name, tensor)
            return f"{name} is {new[:20]!r}"
        case 2:
            values[draw.choice(["more", f"{name}.more", f"exp_avg/{name}", f"step/{name}"])] = tensor
            return f"{name} twice"
        case 3:
            values[name] = tensor.to(draw.choice(DTYPES))
            return f"{name} as {values[name].dtype}"
        case 4:
            shapes = [(), (0,), (-1,), (1, -1), (-1, 1, 1), tuple(reversed(tensor.shape))]
            shape = draw.choice(shapes)
            values[name] = tensor.flatten()[0] if shape == () else tensor.flatten()[:0] if shape == (0,) else tensor
            values[name] = values[name].reshape(shape)
            return f"{name} in {tuple(values[name].shape)}"
        case 5:
            values[name] = torch.cat([tensor.flatten()] * draw.choice([2, 3]))
            return f"{name} longer"
        case 6:
            number = draw.choice(NUMBERS)
            values[name] = (
                torch.full_like(tensor, int(number) % 256 if abs(number) < 1e30 else 1)
                if not tensor.is_floating_point()
                else torch.full_like(tensor, number)
            )
            return f"{name} full of {number}"
        case 7:
            flat = tensor.flatten()
            cut = draw.randint(0, flat.numel())
            start = draw.choice([0, 0, 1, cut])
            values[name] = TensorShard(flat[:cut], start, tuple(tensor.shape))
            return f"{name} a shard of {cut} from {start}"
        case _:
            values[name] = TensorShard(tensor.flatten(), 0, draw.choice([(), (2**40,), (0,), (2**24, 2**24), (1,) * 8]))
            return f"{name} a shard of another shape"


def _change_header(path: Path, draw: random.Random) -> str:
    """Another value somewhere in the header of a file, whose numbers stay."""
    file = draw.choice(sorted(file.name for file in path.iterdir() if part_of(file.name)))
    content = (path / file).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    *way, last = draw.choice(places(header))
    holder = header
    for key in way:
        holder = holder[key]
    if isinstance(holder, dict) and draw.random() < 0.3:
        value: Any = draw.choice(NAMES)
        holder[value] = holder.pop(last)
    else:
        value = holder[last] = draw.choice(IN_HEADERS)
    if draw.random() < 0.2:
        value = draw.choice(['{"a": [0, 1]}', "[]", '{"', '{"lm_head.weight": [0, 97, 32]}', '{"cpu": [2, 5056]}'])
        header.setdefault("__metadata__", {})
        if isinstance(header["__metadata__"], dict):
            header["__metadata__"]["fragments"] = value
    spelled = json.dumps(header).encode()
    (path / file).write_bytes(len(spelled).to_bytes(8, "little") + spelled + content[8 + length :])
    return f"{file}: header {way} {last!r} is {str(value)[:60]!r}"


def main(config: str, runs_dir: str, seed: str, count: str, *flags: str) -> None:
    import p828.train.build  # noqa: F401 (once for all forks)

    if "deepspeed" in flags:
        import deepspeed  # noqa: F401
    kept, run = Path(runs_dir) / "kept", Path(runs_dir) / "tiny"
    if not kept.exists():
        shutil.copytree(run, kept)
    for number in range(int(count)):
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        draw = random.Random(f"{seed}-{number}")
        how = change(run / CHECKPOINTS / name_of(STEP), draw)
        said = Path(runs_dir) / "said.txt"
        said.unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            os._exit(_resume(said, ["train", config, "--runs-dir", runs_dir, "--train.steps", str(STEP + 1), *flags]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([how, code, said.read_text() if said.exists() else ""]), flush=True)


def _resume(said: Path, arguments: list[str]) -> int:
    """The command's exit code; what it and its libraries say on standard error goes to a file."""
    code = 1
    with said.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = dispatch(arguments)
        except BaseException:
            traceback.print_exc()
    return code


if __name__ == "__main__":
    main(*sys.argv[1:])
