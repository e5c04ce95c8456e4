"""AdamW (arXiv 1711.05101) with decay where it belongs, and float32 masters of what layers compute with in bfloat16.

In a bfloat16 run the matrices are updated by `p828.kernels.adamw`: 12 bytes a parameter with bfloat16 moments, 2 of
them the weight, 2 the rest of its master, 4 the sum of its gradients and 4 the moments. Norms, sinks and router, and
every parameter of a float32 run, are left to `torch.optim.AdamW`.

Nothing here makes the host wait for the device: how far gradients are clipped and whether the step is applied at all
are tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from p828.config import OptimizerConfig
from p828.errors import ConfigError
from p828.kernels.adamw import adamw_, bias_corrections, join_float32, split_float32
from p828.kernels.adamw_state import MatrixState, Update
from p828.model.precision import matrices
from p828.runs.tensors import Master


class Optimizer:
    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        dtype: torch.dtype,
        moment_dtype: torch.dtype,
        sums: Mapping[Tensor, Tensor],
    ) -> None:
        """For a float32 model on its device. If layers compute in `dtype` bfloat16, the model's matrices become so.

        `sums` holds every parameter's gradient, float32, always in the same place.
        """
        self.config = config
        self._parameters = dict(model.named_parameters())
        self._sums = sums
        self._matrices: dict[Tensor, MatrixState] = {}
        if dtype == torch.bfloat16:
            self._matrices = {p: _split(p, moment_dtype, sums[p]) for _, p in matrices(model)}
        decayed = decayed_names(model, config)
        self._decayed = {p for name, p in self._parameters.items() if name in decayed}
        self._updates = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)

        others = [p for p in self._parameters.values() if p not in self._matrices]
        groups = [
            {"params": [p for p in others if p in self._decayed], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p not in self._decayed], "weight_decay": 0.0},
        ]
        self._others = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
        for parameter in others:
            parameter.grad = sums[parameter]
            # Made here and not at the first update, so that a checkpoint from before it is complete, too.
            self._others.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def gradients(self) -> dict[str, Tensor]:
        """The float32 sums of the step so far, by parameter."""
        return {name: self._sums[parameter] for name, parameter in self._parameters.items()}

    def gradient_norm(self) -> Tensor:
        """Global norm of the step's gradients, a float32 scalar."""
        return torch.nn.utils.get_total_norm(self.gradients().values())

    @torch.no_grad()
    def update(self, learning_rate: float, norm: Tensor, applied: Tensor) -> None:
        """Clip gradients of global norm `norm` and update all parameters, if `applied`, a bool scalar, is true."""
        config = self.config
        # The factor of `torch.nn.utils.clip_grad_norm_`; the updates multiply by it, which saves a pass.
        clip = (config.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        found_inf = (~applied).float()
        for group in self._others.param_groups:
            group["lr"] = learning_rate
        self._others.grad_scale, self._others.found_inf = 1 / clip, found_inf  # type: ignore[attr-defined]
        self._others.step()

        corrections = bias_corrections(config.betas, self._updates)
        update = Update(learning_rate, config.betas, config.eps, clip, found_inf, self._updates, corrections)
        for number, (parameter, state) in enumerate(self._matrices.items()):
            adamw_(state, update, config.weight_decay if parameter in self._decayed else 0.0, number)
        self._updates += applied

    def masters(self) -> dict[str, Tensor]:
        """Names and float32 values, on the CPU, of the parameters that the model holds in bfloat16."""
        return {name: join_float32(*master).cpu() for name, master in self.halves().items()}

    def halves(self) -> dict[str, Master]:
        """The same masters in their two halves, on the device where they are kept."""
        return {
            name: Master(self._matrices[p].weight, self._matrices[p].low_bits)
            for name, p in self._parameters.items()
            if p in self._matrices
        }

    def load_masters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `masters` gives from float32 tensors, which may hold others."""
        for name, parameter in self._parameters.items():
            if parameter in self._matrices:
                state = self._matrices[parameter]
                high, low = split_float32(tensors[name].to(parameter.device))
                state.weight.copy_(high)
                state.low_bits.copy_(low)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as flat tensors, `exp_avg/PARAMETER` and so on, for a file without pickle."""
        return {f"{key}/{name}": value for name, p in self._parameters.items() for key, value in self._state(p).items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, here or where parameters or moments have another dtype.

        What is not there is zero, as before the first update.
        """
        for name, parameter in self._parameters.items():
            for key, own in self._state(parameter).items():
                value = tensors.get(f"{key}/{name}")
                if key == "step" and parameter in self._matrices:
                    own = self._updates
                own.zero_() if value is None else own.copy_(value)

    def _state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        if parameter not in self._matrices:
            return self._others.state[parameter]
        state = self._matrices[parameter]
        return {"step": self._updates.float(), "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}


def pick_moment_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The moments' dtype for layers that compute in `dtype`. Raises ConfigError for bfloat16 in a float32 run."""
    if wanted == "bfloat16" and dtype != torch.bfloat16:
        raise ConfigError(
            'optimizer.moment_dtype = "bfloat16": accepted in bfloat16 runs (train.dtype); this one is in float32'
        )
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _split(parameter: nn.Parameter, moment_dtype: torch.dtype, gradient: Tensor) -> MatrixState:
    """Make a float32 parameter bfloat16 and keep the rest of it."""
    parameter.data, low_bits = split_float32(parameter.data)
    return MatrixState(
        parameter.data,
        low_bits,
        gradient,
        exp_avg=torch.zeros_like(low_bits, dtype=moment_dtype),
        exp_avg_sq=torch.zeros_like(low_bits, dtype=moment_dtype),
    )


def decayed_names(model: nn.Module, config: OptimizerConfig) -> set[str]:
    """Matrices decay; norms, sinks and, unless asked for, the embedding do not."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and (config.decay_embeddings or "embed_tokens" not in name)
    }
