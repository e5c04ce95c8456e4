"""Which parameters are stored in the dtype that layers compute in."""

from collections.abc import Iterator

from torch import nn


def is_matrix(name: str, dimensions: int) -> bool:
    """Whether a parameter is a matrix other than the router's.

    Layers would cast these to the dtype they compute in at each use. Router, norms and sinks compute in float32.
    """
    return dimensions > 1 and not name.endswith(".gate.weight")


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every matrix but the router's."""
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter.ndim):
            yield name, parameter
