"""AdamW (arXiv 1711.05101) on float32 masters, with weight decay on matrices only.

In a bfloat16 run the matrices are updated by `p828.kernels.adamw`. It takes 12 bytes a parameter with bfloat16 moments:
2 for the weight, 2 for the low bits of its master, 4 for the sum of its gradients and 4 for the moments. Norms, sinks
and router, and every parameter of a float32 run, are updated by PyTorch's fused step, called as a function: the class
`torch.optim.AdamW` imports PyTorch's compiler, which takes a second of every start.

The host does not wait for the device: the factor that clips the gradients is a tensor, and so is whether the step is
applied at all.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from p828.config import OptimizerConfig
from p828.errors import ConfigError
from p828.kernels.adamw import adamw_, bias_corrections
from p828.kernels.adamw_state import MatrixState, Update
from p828.model.backend import uses_triton
from p828.optim.clipping import clip_factor
from p828.optim.groups import Group
from p828.runs.tensors import Master


class _Group(NamedTuple):
    """Parameters of one weight decay and their state, as PyTorch's fused step takes them."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    weight_decay: float


class AdamW:
    """An `optim.interface.Optimizer`."""

    state_keys = ("exp_avg", "exp_avg_sq", "step")

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: OptimizerConfig,
        groups: Mapping[str, Group],
        masters: Mapping[Tensor, Master],
        moment_dtype: torch.dtype,
        sums: Mapping[Tensor, Tensor],
        first_number: int = 0,
    ) -> None:
        """For `parameters` by name, whose groups are `groups`; those stored in bfloat16 have `masters`.

        `moment_dtype` is that of the matrices with masters; all other moments are float32. `sums` holds every
        parameter's gradient, float32, always in the same place. Matrices are numbered from `first_number` on, and their
        numbers keep the noise of their moments apart.
        """
        self.config = config
        self._parameters = dict(parameters)
        self._decayed = {parameter for name, parameter in self._parameters.items() if groups[name].decays}
        self._matrices = {p: _matrix_state(master, sums[p], moment_dtype) for p, master in masters.items()}
        self._updates = torch.zeros((), dtype=torch.int64, device=next(iter(sums.values())).device)
        others = [parameter for parameter in self._parameters.values() if parameter not in masters]
        self._first_number = first_number
        self._others = {parameter: _empty_state(parameter) for parameter in others}
        self._groups = [
            self._group([p for p in others if p in self._decayed], sums, config.weight_decay),
            self._group([p for p in others if p not in self._decayed], sums, 0.0),
        ]

    def _group(self, parameters: list[Tensor], sums: Mapping[Tensor, Tensor], weight_decay: float) -> _Group:
        exp_avgs, exp_avg_sqs, steps = (
            [self._others[parameter][key] for parameter in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        gradients = [sums[parameter] for parameter in parameters]
        return _Group(parameters, gradients, exp_avgs, exp_avg_sqs, steps, weight_decay)

    @torch.no_grad()
    def update(
        self,
        learning_rate: float,
        norm: Tensor,
        applied: Tensor,
        when_updated: Callable[[Tensor], None] = lambda parameter: None,
    ) -> None:
        """Clip gradients of global norm `norm` and update all parameters, if `applied`, a bool scalar, is true.

        `when_updated` gets each matrix with a master when the device has been given its update.
        """
        config = self.config
        clip = clip_factor(norm, config.max_grad_norm)
        found_inf = (~applied).float()
        for group in self._groups:
            adamw(
                group.parameters, group.gradients, group.exp_avgs, group.exp_avg_sqs, [], group.steps, fused=True,
                grad_scale=1 / clip, found_inf=found_inf, amsgrad=False, maximize=False, lr=learning_rate,
                beta1=config.betas[0], beta2=config.betas[1], eps=config.eps, weight_decay=group.weight_decay,
            )  # fmt: skip

        corrections = bias_corrections(config.betas, self._updates)
        update = Update(learning_rate, config.betas, config.eps, clip, found_inf, self._updates, corrections)
        for number, (parameter, state) in enumerate(self._matrices.items(), start=self._first_number):
            adamw_(state, update, config.weight_decay if parameter in self._decayed else 0.0, number)
            when_updated(parameter)
        self._updates += applied

    def state_dict(self) -> dict[str, Tensor]:
        """`exp_avg/PARAMETER`, `exp_avg_sq/PARAMETER` and `step/PARAMETER` (a float32 scalar) of every parameter."""
        return {f"{key}/{name}": value for name, p in self._parameters.items() for key, value in self._state(p).items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, here or where parameters or moments have another dtype.

        State that is missing in `tensors` becomes zero, as before the first update.
        """
        for name, parameter in self._parameters.items():
            for key, own in self._state(parameter).items():
                value = tensors.get(f"{key}/{name}")
                if key == "step" and parameter in self._matrices:
                    own = self._updates
                own.zero_() if value is None else own.copy_(value)

    def _state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        if parameter not in self._matrices:
            return self._others[parameter]
        state = self._matrices[parameter]
        return {"step": self._updates.float(), "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}


def pick_moment_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The moments' dtype for layers that compute in `dtype`. Raises ConfigError for bfloat16 in a float32 run."""
    if wanted == "bfloat16" and dtype != torch.bfloat16:
        raise ConfigError(
            'optimizer.moment_dtype = "bfloat16": accepted in bfloat16 runs (train.dtype); this one is in float32'
        )
    if wanted == "auto":
        return torch.bfloat16 if uses_triton(device, dtype) else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _empty_state(parameter: Tensor) -> dict[str, Tensor]:
    """Zeros, made before the first update so that a checkpoint from before it is complete, too."""
    moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **moments}


def _matrix_state(master: Master, gradient: Tensor, moment_dtype: torch.dtype) -> MatrixState:
    """A matrix as the kernel takes it, with moments of zero."""
    first, second = (torch.zeros_like(master.low_bits, dtype=moment_dtype) for _ in range(2))
    return MatrixState(master.weight, master.low_bits, gradient, exp_avg=first, exp_avg_sq=second)
