"""The engine for one device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import Config
from p828.data.batch import Batch
from p828.engine.cuda_graph import is_capturable
from p828.engine.interface import StepResult, StepStats
from p828.engine.microbatch import GradientAccumulator, prepare_layers
from p828.model.backend import check_widths
from p828.model.init import initial_model
from p828.model.transformer import Transformer
from p828.optim.adamw import AdamW, pick_moment_dtype
from p828.optim.balance import update_biases
from p828.optim.clipping import global_norm, gradient_norms
from p828.optim.groups import parameter_groups
from p828.optim.interface import Optimizer
from p828.optim.masters import Masters
from p828.optim.parts import ByPart, parts_of
from p828.optim.update_numbers import Held, UpdateNumbers
from p828.runs.tensors import Saveable, Tensors
from p828.runs.weights import Weights
from p828.system.device import compiles, pick_device, pick_dtype, random_states, restore_random_states
from p828.system.timing import DeviceSpan


class PlainEngine:
    """float32 masters, layers that hold and compute in the run's dtype, AdamW."""

    is_sharded = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = pick_device(config.train.device)
        self.dtype = pick_dtype(config.train.dtype, self.device)
        check_widths(config.model, self.device, self.dtype)
        torch.manual_seed(config.train.seed)  # for dropout; a resume brings the state back
        self.model = initial_model(config.model, self.device, config.train.seed)
        prepare_layers(self.model, config.train, config.balance)
        if compiles(config.train, self.device):
            for layer in self.model.layers:
                layer.compile()
        is_captured = is_capturable(config.model, config.train, self.device, self.dtype)
        self.gradients = GradientAccumulator(self.model, config.balance, self.dtype, is_captured)
        self.masters = Masters(self.model, self.dtype)
        self.optimizer: Optimizer = self._make_optimizer()
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        self._parts = parts_of(self._names.values())
        self._by_part = ByPart([self._names[p] for p in self.gradients.sums], self._parts, self.device)
        self._update_numbers = UpdateNumbers(self.model, list(self._held()), self._parts)
        self._span = DeviceSpan()

    def _make_optimizer(self) -> Optimizer:
        config = self.config.optimizer
        groups = parameter_groups(self.model, config, self.dtype)
        moment_dtype = pick_moment_dtype(config.moment_dtype, self.dtype, self.device)
        parameters, sums = dict(self.model.named_parameters()), self.gradients.sums
        return AdamW(parameters, config, groups, self.masters.by_parameter, moment_dtype, sums)

    @property
    def state_keys(self) -> tuple[str, ...]:
        return self.optimizer.state_keys

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add the gradients of one micro-batch. `num_targets` counts the whole step's targets."""
        self._span.begin()
        self.gradients.scale.fill_(1 / num_targets)
        self.gradients.add(batch)
        self._span.pause()

    def step(self, learning_rate: float, is_measured: bool = False) -> StepResult:
        """Clip the gradients, update weights and balance bias, and begin the next step.

        Weights, bias and the optimizer's state stay as they are if the loss or the gradient is not finite. All of it
        is started on the device before the host asks for a number, and the device still updates weights when the host
        has it. `is_measured`: also measure what the update does, for which the host waits.
        """
        self._span.begin()
        totals = self.gradients.totals
        if is_measured:
            self._update_numbers.begin()
        with record_function("Optimizer.step"):
            norms_P = gradient_norms(self.gradients.sums.values())
            norm = global_norm(norms_P)
            applied = torch.isfinite(totals["loss"]) & torch.isfinite(norm)
        update_biases(self.model, totals["loads_LE"], self.config.balance.update_rate, applied)
        by_part = {"grad_norms": self._by_part.sum(norms_P.square()).sqrt()}
        # On their way to the host while weights are updated, unless something of the update is told, too.
        stats = None if is_measured else StepStats.of(self.model, totals, norm, by_part)
        with record_function("Optimizer.step"):
            self.optimizer.update(learning_rate, norm, applied)
        if stats is None:
            stats = StepStats.of(self.model, totals, norm, by_part, self._update_numbers.finish(totals["loads_LE"]))
        self.gradients.begin_step()
        return stats.fetch(self._parts, self._span)  # all that the host waits for in a step

    def _held(self) -> Iterator[Held]:
        masters = self.masters.by_parameter
        for parameter, name in self._names.items():
            low_bits = masters[parameter].low_bits.view(-1) if parameter in masters else None
            yield Held(name, parameter.data.view(-1), low_bits)

    def state_dict(self) -> dict[str, dict[str, Saveable]]:
        """What a checkpoint needs, by file and name. The tensors are the engine's own; masters are not joined."""
        return {
            "model": {**self.model.state_dict(), **self.masters.state_dict()},
            "optimizer": {**self.optimizer.state_dict()},
            "random": {**random_states(self.device)},
        }

    @contextmanager
    def model_for_evaluation(self) -> Iterator[Transformer]:
        """The model; on one device it is always whole."""
        yield self.model

    model_for_any_passes = model_for_evaluation

    def load_weights(self, weights: Weights) -> None:
        """Begin from these weights and balance biases, with the optimizer as it is."""
        masters = self.masters.state_dict()
        for name, tensor in self.model.state_dict().items():
            if name not in masters:
                tensor.copy_(weights[name])
        self.masters.load_state_dict(weights)

    def load_state_dict(self, tensors: Mapping[str, dict[str, Tensor]] | Tensors) -> None:
        """Go on from what any engine saved."""
        self.model.load_state_dict(tensors["model"])
        self.masters.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        restore_random_states(tensors["random"], self.device)
