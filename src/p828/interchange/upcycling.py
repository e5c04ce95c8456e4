"""A dense model's weights as those of experts, which begin as the same function.

Every expert is a copy of its layer's MLP (Sparse Upcycling, arXiv 2212.05055), or one of the G slices of a copy
(granular upcycling with virtual groups, arXiv 2410.07524): experts c G … c G + G - 1 are the slices of copy c, and
begin with one row of the router, so that they are chosen together. The K chosen experts are then K / G whole copies,
whose weights sum to `routed_scaling_factor`, a slice having the G-th part of its copy's. With `down_proj` times
G / `routed_scaling_factor` their sum is the dense MLP's output. Shared experts begin with a `down_proj` of 0.
"""

from math import prod

import torch
from torch import Tensor

from p828.config import ModelConfig
from p828.model.init import initialise_slice
from p828.model.transformer import Transformer
from p828.runs.weights import Weights

ROUTER, BIAS = ".mlp.gate.weight", ".mlp.gate.e_score_correction_bias"
GATE_UP, DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"
SHARED = ".mlp.shared_experts."


class UpcycledWeights(Weights):
    """Those of `model`, made of the weights of `dense`; router and shared experts are drawn from the seed."""

    def __init__(self, weights: Weights, dense: ModelConfig, model: ModelConfig, seed: int) -> None:
        self._weights, self._model, self._seed = weights, model, seed
        self._slices = dense.moe_intermediate_size // model.moe_intermediate_size
        with torch.device("meta"):
            self.shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(model).state_dict().items()}

    def shard(self, name: str, start: int, count: int) -> Tensor:
        if name.endswith((GATE_UP, DOWN)):
            return self._experts(name, start, count)
        if name.endswith(ROUTER):
            rows_EH = self._drawn(name).view(self.shapes[name])[:: self._slices]
            return rows_EH.repeat_interleave(self._slices, dim=0).flatten()[start : start + count]
        if name.endswith(BIAS) or (SHARED in name and name.endswith("down_proj.weight")):
            return torch.zeros(count)
        if SHARED in name:
            return self._drawn(name, start, count)
        return self._weights.shard(name, start, count)

    def _drawn(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """What a new model begins with."""
        values = torch.empty(prod(self.shapes[name]) if count is None else count)
        initialise_slice(values, name, self._model, self._seed, start)
        return values

    def _experts(self, name: str, start: int, count: int) -> Tensor:
        """Copy by copy: in memory are the dense MLP and the result."""
        slices, size = self._slices, prod(self.shapes[name][1:])  # of an expert
        dense = self._weights[name][0]
        experts = [self._slice(name, dense, number).flatten() for number in range(slices)]
        values = torch.empty(count)
        for expert in range(start // size, -(-(start + count) // size)):
            begin, end = max(start, expert * size), min(start + count, (expert + 1) * size)
            values[begin - start : end - start] = experts[expert % slices][begin - expert * size : end - expert * size]
        return values

    def _slice(self, name: str, dense: Tensor, number: int) -> Tensor:
        """The weights of the inner dimensions that a slice has."""
        inner = self._model.moe_intermediate_size
        own = slice(number * inner, (number + 1) * inner)
        if name.endswith(DOWN):
            return dense[:, own] * (self._slices / self._model.routed_scaling_factor)
        # gate and up projection, each of one or (swiglu_of_product) two halves that are as wide as the MLP
        return dense.unflatten(0, (-1, inner * self._slices))[:, own].flatten(0, 1)
