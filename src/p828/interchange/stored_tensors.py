"""The tensors of a directory in the hub's layout: `model.safetensors`, or several files and an index. None is pickled.

The files may be from anywhere. What is read of them before a tensor are names, shapes and dtypes.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from p828.config.values import shown
from p828.errors import DataError, reason
from p828.files import MEBIBYTE, open_regular, read_limited
from p828.runs.tensors import LONGEST_CAUSE, Kind

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 64 * MEBIBYTE
FILE_NAME = re.compile(r"(?=.{1,255}$)\w[\w.-]*\.safetensors")
DTYPES = ("F32", "BF16", "F16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class StoredTensors:
    """Use in a `with`, which keeps the files open. Raises DataError naming the file or the tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kinds: dict[str, Kind] = {}
        """Every tensor's dtype, one of `DTYPES`, and shape, by name."""
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        try:
            listed = _listed(directory)
            for file in sorted(set(listed.values())) or [SINGLE]:
                self._open(file)
            if missing := sorted(listed.keys() - self.kinds.keys()):
                raise DataError(f"{directory / listed[missing[0]]}: lacks {shown(missing[0])}, which {INDEX} lists")
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def numbers(self, name: str, start: int, end: int) -> Tensor:
        """(end - start,): the flattened tensor's numbers from index `start` on, in its own dtype."""
        with self._reading(name):
            values: Tensor = self._files[name].get_tensor(name).flatten()[start:end]
        return values

    def size(self) -> int:
        """Numbers in all tensors together."""
        return sum(prod(kind.shape) for kind in self.kinds.values())

    def _open(self, file: str) -> None:
        path = self.directory / file
        with self._reading(file):
            open_regular(path).close()
            opened = self._stack.enter_context(safe_open(path, "pt"))
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                values = opened.get_slice(name)
                if values.get_dtype() not in DTYPES:
                    raise ValueError(f"{shown(name)} holds {values.get_dtype()}; {', '.join(DTYPES)} are accepted")
                if name in self.kinds:
                    raise ValueError(f"{shown(name)} is in another file, too")
                self.kinds[name] = Kind(values.get_dtype(), tuple(values.get_shape()))
                self._files[name] = opened

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise DataError(f"{self.directory / what}: cannot be read: {reason(error)[:LONGEST_CAUSE]}") from None


def _listed(directory: Path) -> dict[str, str]:
    """The file of each tensor, as the index has it; none where one file holds all. Raises DataError."""
    path = directory / INDEX
    if (directory / SINGLE).exists():
        return {}
    if not path.exists():
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise DataError(
                f"{directory / pickles[0]}: a pickle, which may run what it likes, is not read; "
                f"{SINGLE} is, as save_pretrained writes it"
            )
        raise DataError(f"{directory}: neither {SINGLE} nor {INDEX} is there")
    try:
        listed = json.loads(read_limited(path, LARGEST_INDEX))["weight_map"]
        if not isinstance(listed, dict) or not listed:
            raise ValueError("weight_map is no table of tensors")
        for file in listed.values():
            if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
                raise ValueError(f"weight_map names {shown(file)}: a .safetensors file beside it is accepted")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {reason(error)[:LONGEST_CAUSE]}") from None
    return listed
