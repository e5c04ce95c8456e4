"""Which routed experts the tokens of a continuation went through, and how evenly the experts were used.

L counts layers, K experts a token, E experts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p828.inference.decode.sequence import NewToken
from p828.inference.evaluate import evaluation_mode
from p828.model.router import Routing
from p828.model.transformer import Transformer

Chosen = tuple[tuple[int, ...], ...]
"""A token's experts, [L, K], the best first."""


@dataclass
class ExpertUse:
    """The experts of one prompt and its continuation: of each token as the layers read it."""

    ids: list[int]
    """The prompt's tokens, and those of the continuation as they come."""
    experts: list[Chosen]
    """Of each token that was read: the last one is not, unless the model ended the text behind it."""

    def add(self, token: NewToken) -> None:
        """Note a token that was made: the step that chose it read the token before it."""
        if token.experts_LK is not None:
            self.experts.append(token.experts_LK)
        if token.finish_reason != "end":
            self.ids.append(token.token)


def prompt_use(model: Transformer, ids: Sequence[int], eos_id: int, dtype: torch.dtype) -> ExpertUse:
    """The experts of a prompt's tokens, from a pass over it; an empty prompt is the end of another document."""
    ids = list(ids) or [eos_id]
    found: list[Tensor] = []

    def note(router: object, inputs: object, routing: Routing) -> None:
        found.append(routing.experts_TK)

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.layers]
    try:
        with evaluation_mode(model):
            model(torch.tensor([ids], device=model.head_weight.device), dtype=dtype)
    finally:
        for hook in hooks:
            hook.remove()
    experts_TLK = torch.stack(found, dim=1).tolist()
    return ExpertUse(ids, [tuple(map(tuple, experts_LK)) for experts_LK in experts_TLK])


@dataclass
class ExpertLoads:
    """How many times each expert was chosen, layer by layer."""

    layers: int
    experts: int
    tokens: int = 0
    """That were read."""
    counts_LE: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts_LE = [[0] * self.experts for _ in range(self.layers)]

    def add(self, use: ExpertUse) -> None:
        for chosen_LK in use.experts:
            self.add_token(chosen_LK)

    def add_token(self, chosen_LK: Chosen) -> None:
        self.tokens += 1
        for counts_E, chosen_K in zip(self.counts_LE, chosen_LK, strict=True):
            for expert in chosen_K:
                counts_E[expert] += 1

    def shares(self, layer: int) -> list[float]:
        """Each expert's part of the layer's choices; the parts of a layer add up to 1."""
        counts_E = self.counts_LE[layer]
        return [count / max(sum(counts_E), 1) for count in counts_E]

    def spread(self, layer: int) -> tuple[float, float]:
        """Mean and standard deviation of the layer's counts over all of its experts."""
        counts_E = self.counts_LE[layer]
        mean = sum(counts_E) / len(counts_E)
        return mean, (sum((count - mean) ** 2 for count in counts_E) / len(counts_E)) ** 0.5
