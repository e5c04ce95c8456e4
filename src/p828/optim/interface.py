"""What an engine asks of an optimizer."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Optimizer(Protocol):
    """An update rule with its state, for the parameters of a model that it was made for.

    It is made with the float32 sums of a step's gradients, which always lie in the same place, and with the `Masters`
    of parameters that are stored in bfloat16. Another update rule is another file beside `adamw.py`.
    """

    @property
    def state_keys(self) -> tuple[str, ...]:
        """What `state_dict` holds of every parameter: `KEY/PARAMETER` for each of these keys.

        It has the parameter's shape, or, with the key `step`, is a float32 scalar: the number of its updates.
        """
        ...

    def update(self, learning_rate: float, norm: Tensor, applied: Tensor) -> None:
        """Clip the gradients, whose global norm is `norm`, and update all parameters.

        Nothing changes where `applied`, a bool scalar on the device, is false. The host does not wait for the device.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors named as `state_keys` says, for a checkpoint without pickle.

        They are the optimizer's own and not copies.
        """

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. State that is missing in it becomes zero, as before the first update."""
