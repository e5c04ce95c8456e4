"""Which parameters are stored in the dtype that layers compute in."""

from collections.abc import Iterator

from torch import nn


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every matrix but the router's.

    Layers would cast these to the dtype they compute in at each use. Router, norms and sinks compute in float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith(".gate.weight"):
            yield name, parameter
