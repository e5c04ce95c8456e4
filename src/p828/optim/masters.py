"""float32 masters of the parameters that a model stores in bfloat16.

A master is the bfloat16 weight, which the layers compute with, and the low bits that float32 has beyond it. Together
the two take 4 bytes a parameter, as the float32 number would by itself.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from p828.kernels.adamw import split_float32
from p828.model.precision import matrices
from p828.runs.tensors import Master


class Masters:
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """For a float32 model on its device. If layers compute in `dtype` bfloat16, its matrices become bfloat16."""
        self._by_parameter: dict[Tensor, Master] = {}
        self._names: dict[Tensor, str] = {}
        for name, parameter in matrices(model) if dtype == torch.bfloat16 else ():
            parameter.data, low_bits = split_float32(parameter.data)
            self._by_parameter[parameter] = Master(parameter.data, low_bits)
            self._names[parameter] = name

    @property
    def by_parameter(self) -> Mapping[Tensor, Master]:
        """Those of the parameters that are stored in bfloat16. Every other one is its own float32 master."""
        return self._by_parameter

    def state_dict(self) -> dict[str, Master]:
        """Masters by the parameter's name, not joined; the tensors are the ones that training goes on with."""
        return {self._names[parameter]: master for parameter, master in self._by_parameter.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all masters from float32 tensors by name. `tensors` may hold more than these."""
        for name, master in self.state_dict().items():
            high, low = split_float32(tensors[name].to(master.weight.device))
            master.weight.copy_(high)
            master.low_bits.copy_(low)
