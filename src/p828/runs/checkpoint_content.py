"""Checks that a checkpoint's content is what a run writes, field by field and tensor by tensor, before it is used.

A checksum shows that a file is as it was written. It does not show that p828 wrote it.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from p828.config import Config, ModelConfig, from_dict
from p828.config.values import shown
from p828.data.order import held_out_rules
from p828.errors import ConfigError
from p828.model.transformer import Transformer
from p828.runs.checkpoint import OpenCheckpoint
from p828.runs.file_names import STATE_FILE
from p828.runs.manifest import DamagedCheckpoint
from p828.runs.tensors import Kind, part_of
from p828.runs.train_state import TrainState, with_current_names

MOST = 2**63 - 1  # of a whole number
CUDA_STATE = Kind("U8", (16,))  # of PyTorch's generator on a GPU: its seed and its offset
FIRST_FIELDS = {  # of the progress, in every checkpoint of this format; later ones came with the version that has them
    "step", "tokens", "loss", "validation_loss", "best_loss", "best_step", "evaluations_since_best",
    "non_finite_steps", "source_tokens", "documents", "cut_documents",
}  # fmt: skip


def is_weights_only(saved: OpenCheckpoint) -> bool:
    """Whether it is of a model that was imported: a run's own has an optimizer's state, too."""
    return not any(part_of(file) == "optimizer" for file in saved.files)


def config_of(saved: OpenCheckpoint) -> Config:
    """The configuration of the run that wrote the checkpoint. Raises DamagedCheckpoint, and ConfigError for a key."""
    values = saved.state.get("config")
    if not isinstance(values, Mapping):
        raise DamagedCheckpoint(f"{saved.path}: holds no configuration (config in {STATE_FILE})")
    return from_dict(values, str(saved.path))


def rules_of(saved: OpenCheckpoint) -> list[bool | None]:
    """By which rule the run holds out text of each source; empty for a damaged position, which a resume finds."""
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        return held_out_rules(saved.state["data"])
    return []


def check_content(
    saved: OpenCheckpoint, config: Config, first_position: Mapping[str, Any], state_keys: Collection[str]
) -> TrainState:
    """Check everything that a run with this configuration resumes from, and return its train state.

    Args:
        first_position: the position at which the run's data begins; a later one has the same form.
        state_keys: what the run's optimizer keeps of every parameter, as `engine.interface.Engine` says.

    Raises DamagedCheckpoint naming the first field or tensor that is wrong.
    """
    config_of(saved)
    progress = progress_of(saved)
    if len(progress.source_tokens) > len(config.data.source_names):
        raise _wrong(saved, "progress.source_tokens", progress.source_tokens, "a number for each source")
    _check_position(saved, saved.state.get("data"), first_position, "data")
    ranks = saved.state.get("ranks", 1)
    if type(ranks) is not int or not 1 <= ranks <= 2**20:
        raise _wrong(saved, "ranks", ranks, "a number of processes")
    check_weights(saved, config.model)
    _check_optimizer(saved, config.model, progress.step, state_keys)
    _check_random(saved, ranks)
    return progress


def seconds_of(saved: OpenCheckpoint) -> float:
    """Seconds that the run was trained; 0 in checkpoints of older versions. Raises DamagedCheckpoint."""
    seconds = saved.state.get("seconds", 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds <= MOST:
        raise _wrong(saved, "seconds", seconds, "a number of at least 0")
    return float(seconds)


def progress_of(saved: OpenCheckpoint) -> TrainState:
    """The train state in a checkpoint. Raises DamagedCheckpoint naming the field."""
    values = with_current_names(saved.state.get("progress"))
    if not isinstance(values, dict):
        raise _wrong(saved, "progress", values, "a table")
    kinds = typing.get_type_hints(TrainState)
    for name in [*values, *kinds]:
        if name not in kinds:
            raise DamagedCheckpoint(f"{saved.path}: {STATE_FILE}: progress.{shown(name)} is no field of it")
        if name not in values and name in FIRST_FIELDS:
            raise DamagedCheckpoint(f"{saved.path}: {STATE_FILE}: progress.{name} is missing")
        if name in values and not _is_one(values[name], kinds[name]):
            raise _wrong(saved, f"progress.{name}", values[name], _in_words(kinds[name]))
    progress = TrainState(**values)
    if progress.step != saved.step:
        raise _wrong(saved, "progress.step", progress.step, f"{saved.step}, as in the manifest")
    for field in dataclasses.fields(TrainState):
        if field.name.endswith("_step") and (getattr(progress, field.name) or 0) > progress.step:
            raise _wrong(saved, f"progress.{field.name}", getattr(progress, field.name), "no later step than its own")
    return progress


def _check_position(saved: OpenCheckpoint, value: Any, first: Any, key: str) -> None:
    """Compare its form with the first position's: tables, lists, texts and counts. Its reader checks the rest."""
    if isinstance(first, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(saved, key, value, "a table")
        for name in first.keys() & value.keys():
            _check_position(saved, value[name], first[name], f"{key}.{name}")
    elif isinstance(first, list | tuple):
        if not isinstance(value, list):
            raise _wrong(saved, key, value, "a list")
        for number, item in enumerate(value if first else ()):
            _check_position(saved, item, first[min(number, len(first) - 1)], f"{key}[{number}]")
    elif type(first) in (int, str, bool) and not _is_one(value, type(first)):
        raise _wrong(saved, key, value, _in_words(type(first)))


@contextmanager
def reading_position(path: Path) -> Iterator[None]:
    """Raise DamagedCheckpoint for the errors of a block that goes to the checkpoint's data position."""
    try:
        yield
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{path}: {STATE_FILE}: data is no place in it: {type(error).__name__}: {shown(str(error))}"
        ) from error


def check_weights(saved: OpenCheckpoint, model: ModelConfig) -> None:
    """Compare the weights' names, shapes and dtypes with the configured model's. Raises DamagedCheckpoint."""
    names = saved.tensors.names("model")
    if model.num_hidden_layers > len(names):  # before a model of that size is made
        raise DamagedCheckpoint(
            f"{saved.path}: the weights are {len(names)} tensors, "
            f"fewer than model.num_hidden_layers = {model.num_hidden_layers}"
        )
    expected = {name: Kind("F32", shape) for name, (shape, _) in expected_tensors(saved.path, model).items()}
    _check_kinds(saved, "model", "the weights", expected)


def _check_optimizer(saved: OpenCheckpoint, model: ModelConfig, step: int, state_keys: Collection[str]) -> None:
    """Check moments and numbers of updates. Checkpoints of step 0 of older versions lack some."""
    expected: dict[str, Kind] = {}
    for name, (shape, is_parameter) in expected_tensors(saved.path, model).items():
        if is_parameter:
            expected |= {f"{key}/{name}": Kind("F32", () if key == "step" else shape) for key in state_keys}
    found = saved.tensors.names("optimizer")
    if step == 0:
        expected = {name: kind for name, kind in expected.items() if name in set(found)}
    _check_kinds(saved, "optimizer", "the optimizer's state", expected, ("BF16",))
    for name in expected:
        if name.startswith("step/"):
            updates = saved.tensors.tensor("optimizer", name).item()
            if not math.isfinite(updates) or updates != int(updates) or not 0 <= updates <= step:
                raise DamagedCheckpoint(f"{saved.path}: {name} is {updates}: at most {step} updates are possible")


def _check_random(saved: OpenCheckpoint, ranks: int) -> None:
    """Check the random states of every rank that wrote the checkpoint."""
    names = set(saved.tensors.names("random"))
    on_cpu = Kind("U8", tuple(torch.get_rng_state().shape))
    for rank in range(ranks):
        ending = f"/{rank}" if rank else ""
        if f"cpu{ending}" not in names:
            raise DamagedCheckpoint(f"{saved.path}: the random states lack cpu{ending}")
        expected = {f"{device}{ending}": kind for device, kind in (("cpu", on_cpu), ("cuda", CUDA_STATE))}
        for name, kind in expected.items():
            if name in names:
                _check_kind(saved, "random", name, kind)
                state = saved.tensors.tensor("random", name)
                try:
                    torch.Generator().set_state(state) if kind is on_cpu else _check_cuda_state(state)
                except (RuntimeError, ValueError) as error:
                    reason = str(error).splitlines()[0]
                    raise DamagedCheckpoint(f"{saved.path}: the random state {name} is none: {reason}") from None
        names -= expected.keys()
    if names:
        raise DamagedCheckpoint(f"{saved.path}: {shown(min(names))} is the random state of none of {ranks} processes")


def _check_cuda_state(state: torch.Tensor) -> None:
    offset = int.from_bytes(bytes(state[8:].tolist()), "little")
    if offset % 4:
        raise ValueError("its place is no multiple of 4")


def expected_tensors(path: Path, model: ModelConfig) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The shape of each of the model's tensors by name, and whether it is a parameter. Raises DamagedCheckpoint."""
    try:
        with torch.device("meta"):  # which takes no memory
            twin = Transformer(model)
    except (RuntimeError, OverflowError, TypeError):  # sizes beyond what PyTorch can count
        raise DamagedCheckpoint(f"{path}: its configuration is of a model too large to be one") from None
    parameters = {name for name, _ in twin.named_parameters()}
    return {name: (tuple(tensor.shape), name in parameters) for name, tensor in twin.state_dict().items()}


def _check_kinds(
    saved: OpenCheckpoint, part: str, what: str, expected: Mapping[str, Kind], other_dtypes: tuple[str, ...] = ()
) -> None:
    found = set(saved.tensors.names(part))
    for name, kind in expected.items():
        if name not in found:
            raise DamagedCheckpoint(
                f"{saved.path}: {what} lack {name}, which by the configuration has the shape {list(kind.shape)}"
            )
        _check_kind(saved, part, name, kind, () if kind.shape == () else other_dtypes)
    for name in found:
        if name not in expected:
            raise DamagedCheckpoint(
                f"{saved.path}: {what} hold {shown(name)[1:-1]}, which the configured model does not have"
            )


def _check_kind(saved: OpenCheckpoint, part: str, name: str, kind: Kind, other_dtypes: tuple[str, ...] = ()) -> None:
    found = saved.tensors.kind(part, name)
    if found.shape != kind.shape:
        raise DamagedCheckpoint(
            f"{saved.path}: {name} has the shape {shown(list(found.shape))}, "
            f"by the configuration it is {list(kind.shape)}"
        )
    if found.dtype not in (kind.dtype, *other_dtypes):
        raise DamagedCheckpoint(f"{saved.path}: {name} holds numbers of type {found.dtype}, not {kind.dtype}")


def _is_one(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type. Whole numbers are counts here, 0 or more."""
    if isinstance(kind, types.UnionType):
        return any(_is_one(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_one(item, typing.get_args(kind)[0]) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value <= MOST
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) <= MOST)
    return type(value) is (typing.get_origin(kind) or kind)


def _in_words(kind: Any) -> str:
    words = {
        int: "a whole number, 0 or more",
        str: "a text",
        bool: "true or false",
        list[int]: "a list of whole numbers",
    }
    return words.get(kind, "a number or null")


def _wrong(saved: OpenCheckpoint, key: str, value: Any, accepted: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"{saved.path}: {STATE_FILE}: {key} = {shown(value)}: {accepted} is what a run writes there"
    )
