"""The engine for several devices: ZeRO stages 1, 2 and 3 (arXiv 1910.02054) on torch.distributed.

Each rank has some of a step's micro-batches, and updates its shard of every unit (`units.py`). A micro-batch runs in
phases (`phases.py`), as CUDA graphs where that is possible; weights are gathered and gradients reduced between phases,
beside the phases that follow. A gradient is the mean over the targets of all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from p828.config import Config
from p828.data.batch import Batch
from p828.distributed.group import ProcessGroup
from p828.engine.cuda_graph import is_capturable
from p828.engine.interface import StepResult, StepStats
from p828.engine.many_ranks import over_ranks, random_states_of, restore_random_states_of
from p828.engine.microbatch import prepare_layers
from p828.engine.sharded.gradients import ShardedGradients, add_parts_
from p828.engine.sharded.mesh import mesh_of
from p828.engine.sharded.model import gathered_by_layer, gathered_for_any, give_parameters, meta_model
from p828.engine.sharded.phases import PhasedPass
from p828.engine.sharded.registered import RegisteredMemory
from p828.engine.sharded.state import MOMENTS, ShardState, masters_of
from p828.engine.sharded.units import units_of
from p828.engine.sharded.weights import ShardedWeights, following
from p828.model.backend import check_widths
from p828.model.init import initialise_slice
from p828.model.transformer import Transformer
from p828.optim.adamw import AdamW, pick_moment_dtype
from p828.optim.balance import update_biases
from p828.optim.groups import parameter_groups
from p828.optim.parts import parts_of
from p828.optim.update_numbers import Held, UpdateNumbers
from p828.runs.tensors import Saveable, Tensors
from p828.runs.weights import SavedWeights, Weights
from p828.system.device import compiles, pick_device, pick_dtype
from p828.system.timing import DeviceSpan


class ShardedEngine:
    """Weights in the run's dtype, float32 masters and moments, sharded over ranks as the ZeRO stage says."""

    state_keys = (*MOMENTS, "step")

    def __init__(self, config: Config, ranks: ProcessGroup) -> None:
        self.config, self.ranks, self.stage = config, ranks, config.sharded.stage
        self.device = pick_device(config.train.device)
        self.dtype = pick_dtype(config.train.dtype, self.device)
        check_widths(config.model, self.device, self.dtype)
        torch.manual_seed(config.train.seed + ranks.rank)  # for dropout; a resume brings the state back
        self._accumulation, self._micro_batches = config.train.gradient_accumulation, 0
        self.is_sharded = self.stage == 3
        self.model = meta_model(config.model)
        self._groups = parameter_groups(self.model, config.optimizer, self.dtype)
        self.mesh = mesh_of(config.sharded, ranks)
        self.units = units_of(self.model, self.mesh.shards)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        self._memory = memory = RegisteredMemory(self.mesh, self.device, ranks)
        with memory.allocating():
            self.weights = ShardedWeights(self.units, self.stage, self.mesh, like)
        self._small = self._make_parameters()
        low_bits = [
            torch.zeros_like(shard, dtype=torch.int16) if self.dtype == torch.bfloat16 else None
            for shard in self.weights.shards
        ]
        self.state = ShardState(self.units, self.weights.shards, low_bits, self.mesh)
        self._initialise()
        is_once = self.stage < 2 or self.mesh.replicas > 1
        self.reduced_dtype = torch.float32 if is_once else self.dtype
        self.reductions = 1 if is_once else self._accumulation
        """How often gradients are reduced in a step over all ranks or, where each has a replica, over hosts."""
        add_parts = torch.compile(add_parts_) if compiles(config.train, self.device) else add_parts_
        self.gradients = ShardedGradients(self.units, self._small, self.stage, self.mesh, like, memory, add_parts)
        memory.register()
        is_captured = is_capturable(config.model, config.train, self.device, self.dtype)
        self._pass = PhasedPass(
            self.model,
            config.balance,
            self.dtype,
            is_captured,
            self.gradients.places,
            self.gradients.small,
            self.gradients.sets_layers,
        )
        self._following = following([phase.reads for phase in self._pass.phases], self.weights.slots)
        self._reads = [phase.reads for phase in self._pass.phases if phase.reads is not None]
        self._parts = parts_of(name for name, _ in self.model.named_parameters())
        over_replica = partial(over_ranks, group=self.mesh.shard_group)
        self._update_numbers = UpdateNumbers(self.model, list(self._held()), self._parts, over_replica)
        self._span = DeviceSpan()
        self._number_of = {shard: number for number, shard in enumerate(self.weights.shards)}
        self.optimizer = self._make_optimizer(low_bits)

    def _make_parameters(self) -> dict[str, Tensor]:
        """Give the model its weights' memory. Returns the parameters that are in no unit."""
        tensors: dict[str, Tensor] = {}
        for unit, flat in zip(self.units, self.weights.flats, strict=True):
            tensors |= unit.views(flat)
        small = {name for name, _ in self.model.named_parameters()} - tensors.keys()
        for name, parameter in self.model.named_parameters():
            if name in small:
                tensors[name] = torch.empty(parameter.shape, device=self.device)
        give_parameters(self.model, tensors)
        self.model.reset_buffers(self.device)
        prepare_layers(self.model, self.config.train, self.config.balance)
        if compiles(self.config.train, self.device):
            for layer in self.model.layers:  # without the hooks of evaluation, which gather weights
                layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
        return {name: parameter for name, parameter in self.model.named_parameters() if name in small}

    def _initialise(self) -> None:
        """Give every parameter its initial values, of which a rank makes those that it holds."""
        model, seed = self.config.model, self.config.train.seed
        for number, piece in self.state.pieces():
            values = torch.empty(piece.length, device=self.device)
            initialise_slice(values, piece.name, model, seed, piece.start)
            self.state.set_master(number, piece, values)
        for name, parameter in self._small.items():
            initialise_slice(parameter.data, name, model, seed)

    def _make_optimizer(self, low_bits: list[Tensor | None]) -> AdamW:
        """AdamW for this rank's shards, each as one flat parameter by the unit's name, and for the small parameters."""
        config, groups, shards = self.config.optimizer, dict(self._groups), self.weights.shards
        parameters, sums = dict(self._small), {self._small[name]: total for name, total in self.gradients.small.items()}
        for unit, shard, total in zip(self.units, shards, self.gradients.shards, strict=True):
            (groups[unit.name],) = {self._groups[place.name] for place in unit.places}
            parameters[unit.name], sums[shard] = shard, total
        moment_dtype = pick_moment_dtype(config.moment_dtype, self.dtype, self.device)
        first = self.mesh.shard * len(self.units)
        return AdamW(parameters, config, groups, masters_of(shards, low_bits), moment_dtype, sums, first)

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add the gradients of one micro-batch. `num_targets` counts the whole step's targets, on all ranks."""
        self._span.begin()
        is_first = self._micro_batches == 0
        self._micro_batches += 1
        is_last = self._micro_batches == self._accumulation
        self._pass.scale.fill_(1 / num_targets)
        phases = self._pass.phases
        self._before(0)
        for number, phase in enumerate(self._pass(batch, is_first)):
            next_unit = self._following[number]
            if next_unit is not None and not (is_last and self._is_of_next(number)):
                self.weights.gather(next_unit)
            if phase.completes is not None:
                self.gradients.reduce(phase.completes, is_last)
            if number + 1 < len(phases):
                self._before(number + 1)
        if is_last:
            self.gradients.reduce_small()
        self._span.pause()

    def _before(self, number: int) -> None:
        """Have the device wait for what a phase needs."""
        phase = self._pass.phases[number]
        if phase.reads is not None:
            self.weights.wait(phase.reads)
        if phase.writes is not None:
            self.gradients.make_room(phase.writes)

    def _is_of_next(self, number: int) -> bool:
        """Whether what is gathered after a phase is for the next micro-batch."""
        return self._following[number] not in [phase.reads for phase in self._pass.phases[number + 1 :]]

    def step(self, learning_rate: float, is_measured: bool = False) -> StepResult:
        """Clip the gradients, update weights and balance bias, and begin the next step.

        Weights, bias and the optimizer's state stay as they are if the loss or the gradient is not finite. All of it
        is started on the device before the host asks for a number, and the device still updates and gathers weights
        when the host has it. `is_measured`: also measure what the update does, for which the host waits.
        """
        assert self._micro_batches == self._accumulation, "the last of them has to know that it is the last"
        self._span.begin()
        if is_measured:
            self._update_numbers.begin()
        with record_function("Optimizer.step"):
            totals = over_ranks({"squared_norms": self.gradients.finish(), **self._pass.totals})
            squares_X = totals.pop("squared_norms")
            norm = squares_X.sum().sqrt().float()
            applied = torch.isfinite(totals["loss"]) & torch.isfinite(norm)
        loads_LE, by_part = totals["loads_LE"], {"grad_norms": squares_X.sqrt()}
        update_biases(self.model, loads_LE.long(), self.config.balance.update_rate, applied)
        # On their way to the host while weights are updated, unless something of the update is told, too.
        stats = None if is_measured else StepStats.of(self.model, totals, norm, by_part)
        with record_function("Optimizer.step"):
            self.weights.forget()
            self.optimizer.update(learning_rate, norm, applied, self._gather_updated)
            self.weights.gather_first(self._reads)
        if stats is None:
            stats = StepStats.of(self.model, totals, norm, by_part, self._update_numbers.finish(loads_LE))
        self.gradients.begin_step()
        self._pass.begin_step()
        self._micro_batches = 0
        return stats.fetch(self._parts, self._span)  # all that the host waits for in a step

    def _held(self) -> Iterator[Held]:
        """What this rank updates; of what every rank updates, the first one of its replica has it."""
        yield from self.state.held()
        if self.mesh.shard == 0:
            yield from (Held(name, parameter.detach().view(-1)) for name, parameter in self._small.items())

    def _gather_updated(self, shard: Tensor) -> None:
        """Begin to gather a unit that was updated, while others are, if the next forward pass begins with it."""
        number = self._number_of[shard]
        first = next(other for other in self._reads if self.weights.slots[other] == self.weights.slots[number])
        if number == first:
            self.weights.gather(number)

    @contextmanager
    def model_for_evaluation(self) -> Iterator[Transformer]:
        """The model for forward passes. All ranks must make them at once, and the same number of them.

        At stage 3 a forward pass gathers the weights of one layer at a time.
        """
        with gathered_by_layer(self.model, self.weights) if self.stage == 3 else self._gathered() as model:
            yield model

    @contextmanager
    def model_for_any_passes(self) -> Iterator[Transformer]:
        """The model for forward passes of which each rank makes any number, or none. All ranks must enter at once.

        At stage 3 a forward pass gathers the weights of one layer at a time, on all ranks, which leave together.
        """
        is_sharded = self.stage == 3
        with gathered_for_any(self.model, self.weights, self.ranks) if is_sharded else self._gathered() as model:
            yield model

    @contextmanager
    def _gathered(self) -> Iterator[Transformer]:
        """Below stage 3: the model, once all its weights are there."""
        for number in range(len(self.units)):
            self.weights.wait(number)
        yield self.model

    def state_dict(self) -> dict[str, dict[str, Saveable]]:
        """This rank's share of what a checkpoint needs, by file and name. Rank 0 adds what every rank has whole."""
        own = self.optimizer.state_dict()
        model, optimizer = self.state.masters(), self.state.moments(own)
        if self.ranks.is_first:
            sharded = model.keys() | {place.name for unit in self.units for place in unit.places}
            model |= {name: value for name, value in self.model.state_dict().items() if name not in sharded}
            optimizer |= {name: value for name, value in own.items() if name.partition("/")[2] in self._small}
            for unit in self.units:
                optimizer |= {f"step/{place.name}": own[f"step/{unit.name}"].clone() for place in unit.places}
        return {"model": model, "optimizer": optimizer, "random": random_states_of(self.ranks.rank, self.device)}

    def load_weights(self, weights: Weights) -> None:
        """Begin from these weights and balance biases, with the optimizer as it is. A rank reads what it holds."""
        sharded = {place.name for unit in self.units for place in unit.places}
        for name, tensor in self.model.state_dict().items():
            if name not in sharded:
                tensor.copy_(weights[name])
        self.weights.forget()
        self.state.load_masters(weights)

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from what any engine saved, at any stage and on any number of ranks."""
        self.load_weights(SavedWeights(tensors))
        saved = set(tensors.names("optimizer"))
        state = {name: tensors.tensor("optimizer", name) for name in saved if name.partition("/")[2] in self._small}
        for unit in self.units:
            step = f"step/{unit.places[0].name}"
            if step in saved:
                state[f"step/{unit.name}"] = tensors.tensor("optimizer", step)
        self.optimizer.load_state_dict(state)  # what it lacks becomes zero
        self.state.load_moments(self.optimizer.state_dict(), tensors)
        restore_random_states_of(self.ranks.rank, tensors, self.device)
