"""The engine for several devices: DeepSpeed's ZeRO behind the interface of `engine.interface`.

Each rank has some of a step's micro-batches. A gradient is the mean over the targets of all ranks.

At stages 0 and 1 without offload, the gradients are summed and reduced here (`reduce.py`), and DeepSpeed updates the
weights. From stage 2 on, and with offload, a micro-batch goes through DeepSpeed's module, whose hooks reduce gradients.
"""

import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from p828.config import Config, OptimizerConfig
from p828.data.batch import Batch
from p828.distributed.group import ProcessGroup
from p828.engine.cuda_graph import is_capturable
from p828.engine.deepspeed.local_rank import local_rank_of
from p828.engine.deepspeed.partitions import Partition, flat_groups, gradient_pieces, partitions, sync_from_masters
from p828.engine.deepspeed.reduce import GradientReducer
from p828.engine.deepspeed.settings import DeepSpeedSettings, deepspeed_settings
from p828.engine.deepspeed.training_loss import TrainingLoss
from p828.engine.interface import StepResult, StepStats
from p828.engine.many_ranks import over_ranks, random_states_of, restore_random_states_of
from p828.engine.microbatch import add_totals_, prepare_layers, zero_totals
from p828.errors import ConfigError
from p828.model.backend import check_widths
from p828.model.init import initialise_slice
from p828.model.transformer import Layer, Transformer
from p828.optim.balance import update_biases
from p828.optim.clipping import clip_factor, gradient_norms
from p828.optim.groups import parameter_groups
from p828.optim.parts import ByPart, parts_of
from p828.optim.update_numbers import Held, UpdateNumbers
from p828.runs.tensors import Saveable, Tensors
from p828.runs.weights import SavedWeights, Weights
from p828.system.device import compiles, pick_device, pick_dtype
from p828.system.timing import DeviceSpan

MOMENTS = ("exp_avg", "exp_avg_sq")  # without the number of updates, one for all


def check_deepspeed(config: Config, ranks: ProcessGroup) -> DeepSpeedSettings:
    """DeepSpeed's settings for the run. Raises ConfigError if it is not installed or refuses them."""
    device = pick_device(config.train.device)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also beside a GPU
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine = \"deepspeed\": {error.name} is not installed: pip install 'p828[deepspeed]'"
        ) from None
    dtype = pick_dtype(config.train.dtype, device)
    check_widths(config.model, device, dtype)
    settings = deepspeed_settings(config, str(dtype).removeprefix("torch."), ranks.size)
    try:
        DeepSpeedZeroConfig(**settings.values["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ConfigError(f"{config.deepspeed.config}: {key} = {first['input']!r}: {first['msg']}") from None
    return settings


class DeepSpeedEngine:
    """Weights in the run's dtype, float32 masters and moments, sharded over ranks as the ZeRO stage says."""

    state_keys = (*MOMENTS, "step")

    def __init__(self, config: Config, ranks: ProcessGroup, settings: DeepSpeedSettings) -> None:
        self.config, self.ranks, self.stage = config, ranks, settings.stage
        self.device = pick_device(config.train.device)
        self.dtype = pick_dtype(config.train.dtype, self.device)
        torch.manual_seed(config.train.seed + ranks.rank)  # for dropout; a resume brings the state back
        self.is_sharded = self.stage == 3
        self._accumulation = config.train.gradient_accumulation
        self._micro_batches = 0  # of the step, so far
        self._updates = 0
        self._reduces_itself = self.stage < 2 and not settings.offload_optimizer
        with local_rank_of(self.device):
            self.model, self._engine = self._initialize(settings)
        self._optimizer = self._engine.optimizer
        self.partitions = partitions(self._optimizer, self.stage, self.model, ranks.rank)
        self._begin()
        self._reducer = self._make_reducer(settings.values["zero_optimization"]) if self._reduces_itself else None
        self.reductions = 1 if self._reduces_itself else self._accumulation
        """How often gradients are reduced over ranks in a step."""
        self.reduced_dtype = torch.float32 if self._reduces_itself else self.dtype
        self._scale = torch.zeros((), device=self.device)
        self._totals = zero_totals(config.model, config.balance, self.device)
        self._parts = parts_of(name for name, _ in self.model.named_parameters())
        self._update_numbers = UpdateNumbers(self.model, list(self._held()), self._parts, over_ranks)
        self._span = DeviceSpan()

    def _make_reducer(self, zero: Mapping[str, Any]) -> GradientReducer:
        config = self.config
        is_captured = is_capturable(config.model, config.train, self.device, self.dtype)
        reducer = GradientReducer(self._optimizer, zero, self.model, config.balance, self.dtype, is_captured)
        if self.stage == 0:
            parameters = dict(self.model.named_parameters())
            for partition in self.partitions:
                partition.flat.grad = reducer.gradients.sums[parameters[partition.name]]
        return reducer

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add the gradients of one micro-batch. `num_targets` counts the whole step's targets, on all ranks.

        Below stage 2 the step's last micro-batch also reduces the gradients over ranks; from stage 2 on, each does.
        """
        self._span.begin()
        self._micro_batches += 1
        is_last = self._micro_batches == self._accumulation
        if self._reducer is not None:
            self._reducer.gradients.scale.fill_(1 / num_targets)
            self._reducer.add(batch, is_last)
            self._span.pause()
            return
        self._scale.fill_(self.ranks.size / num_targets)  # DeepSpeed takes the mean over ranks
        batch = batch.to(self.device)
        self._engine.set_gradient_accumulation_boundary(is_last)
        with local_rank_of(self.device):  # stage 3 reads it in its first passes, here and in an evaluation
            loss, *totals = self._engine(
                batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.document_ids_BS, self._scale
            )
            self._engine.backward(loss, scale_wrt_gas=False)
        add_totals_(self._totals, dict(zip(self._totals, totals, strict=True)))

    def step(self, learning_rate: float, is_measured: bool = False) -> StepResult:
        """Clip the gradients, update weights and balance bias, and begin the next step.

        Weights, bias and the optimizer's state stay as they are if the loss or the gradient is not finite.
        `is_measured`: also find what the update does to the weights, and what the routers score. From stage 2 on, and
        with offload, the gradients' norms by part are found only then.
        """
        self._span.begin()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if is_measured:
            self._update_numbers.begin()
        if self._reducer is None:  # DeepSpeed waits for the device in between: no span says how long it worked
            result = self._step_of_hooks(is_measured).fetch(self._parts)
        else:
            result = self._step_of_reducer(self._reducer, is_measured).fetch(self._parts, self._span)
        self._updates += result.applied
        self._micro_batches = 0
        return result

    def _step_of_reducer(self, reducer: GradientReducer, is_measured: bool) -> StepStats:
        """As the plain engine does it: all of it is started on the device before the host asks for a number."""
        totals = over_ranks({"squared_norms": reducer.finish(), **reducer.gradients.totals})
        squares_X = totals.pop("squared_norms")
        norm = squares_X.sum().sqrt()
        applied = torch.isfinite(totals["loss"]) & torch.isfinite(norm)
        clip = clip_factor(norm, self.config.optimizer.max_grad_norm)
        update_biases(self.model, totals["loads_LE"].long(), self.config.balance.update_rate, applied)
        by_part = {"grad_norms": squares_X.sqrt()}
        # On their way to the host while weights are updated, unless something of the update is told, too.
        stats = None if is_measured else StepStats.of(self.model, totals, norm, by_part)
        # What torch's AdamW divides gradients by, and whether it leaves everything as it is.
        self._adamw.grad_scale, self._adamw.found_inf = (1 / clip).float(), (~applied).float()  # type: ignore[attr-defined]
        self._update(reducer)
        reducer.gradients.begin_step()
        if stats is None:
            stats = StepStats.of(self.model, totals, norm, by_part, self._update_numbers.finish(totals["loads_LE"]))
        return stats

    def _update(self, reducer: GradientReducer) -> None:
        """Let AdamW update the masters, and set the weights to them."""
        if self.stage == 0:  # whole on every rank, and DeepSpeed would round the sums to the weights' dtype
            self._adamw.step()
            sync_from_masters(self._optimizer, self.stage)
            return
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        for number, share in enumerate(reducer.shares):
            self._optimizer.averaged_gradients[number] = GradPartitionBufferGroup([share], share)
        self._engine.step()

    def _step_of_hooks(self, is_measured: bool) -> StepStats:
        """DeepSpeed has reduced the gradients already; it computes their norm, and clips."""
        by_part = {"squared_norms": self._squared_norms()} if is_measured else {}
        totals = over_ranks({**by_part, **self._totals})
        squares_X = totals.pop("squared_norms", None)
        self._engine.step()
        applied = self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm() if applied else math.nan  # a tensor or a float, by the stage
        update_biases(
            self.model,
            totals["loads_LE"].long(),
            self.config.balance.update_rate,
            torch.tensor(applied, device=self.device),
        )
        for total in self._totals.values():
            total.zero_()
        found = {} if squares_X is None else {"grad_norms": squares_X.sqrt()}
        measured = self._update_numbers.finish(totals["loads_LE"]) if is_measured else None
        norm = torch.as_tensor(norm, dtype=torch.float64, device=self.device)
        return StepStats.of(self.model, totals, norm, found, measured)

    def _squared_norms(self) -> Tensor:
        """This rank's terms of the squares of the gradients' norms by part: float64 (X,). Before the update."""
        found = list(gradient_pieces(self._optimizer, self.stage, self.partitions))
        norms_P = gradient_norms([piece for _, piece in found])
        return ByPart([name for name, _ in found], self._parts, self.device).sum(norms_P.square())

    def _held(self) -> Iterator[Held]:
        parameters = dict(self.model.named_parameters())
        for partition in self._saved_partitions():
            weight = partition.weight_in(parameters[partition.name], self.stage)
            yield Held(partition.name, weight, partition.of(partition.flat).values)

    @contextmanager
    def model_for_any_passes(self) -> Iterator[Transformer]:
        """The model with all its weights, on every rank. At stage 3 they are gathered while the block runs."""
        if self.stage < 3:
            yield self.model
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            # A twin without DeepSpeed's hooks, which would let go of a layer's weights after its use.
            with torch.device("meta"):
                twin = Transformer(self.config.model)
            state = {name: tensor.data for name, tensor in self.model.state_dict(keep_vars=True).items()}
            twin.load_state_dict(state, assign=True)
            twin.frequencies = self.model.frequencies
            yield twin

    @contextmanager
    def model_for_evaluation(self) -> Iterator[Transformer]:
        """The model for forward passes. All ranks must make them at once, and the same number of them.

        At stage 3 a forward pass gathers the weights of one layer at a time.
        """
        if self.stage < 3:
            yield self.model
            return
        import deepspeed

        with local_rank_of(self.device), deepspeed.zero.GatheredParameters([self.model.head_weight]):
            yield self.model

    def state_dict(self) -> dict[str, dict[str, Saveable]]:
        """This rank's share of what a checkpoint needs, by file and name. Rank 0 adds what every rank has whole."""
        held = self._saved_partitions()
        model: dict[str, Saveable] = {partition.name: partition.of(partition.flat) for partition in held}
        optimizer: dict[str, Saveable] = {
            f"{key}/{partition.name}": partition.of(self._state(partition.flat)[key])
            for key in MOMENTS
            for partition in held
        }
        if self.ranks.is_first:
            parameters = dict(self.model.named_parameters())
            model |= {name: value for name, value in self.model.state_dict().items() if name not in parameters}
            optimizer |= {f"step/{name}": torch.tensor(float(self._updates)) for name in parameters}
        return {"model": model, "optimizer": optimizer, "random": random_states_of(self.ranks.rank, self.device)}

    def load_weights(self, weights: Weights) -> None:
        """Begin from these weights and balance biases, with the optimizer as it is. A rank reads what it holds."""
        parameters = dict(self.model.named_parameters())
        for name, buffer in self.model.state_dict().items():
            if name not in parameters:
                buffer.copy_(weights[name])
        for partition in self.partitions:
            values = partition.of(partition.flat).values
            values.copy_(weights.shard(partition.name, partition.start, partition.length))
        sync_from_masters(self._optimizer, self.stage)

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from what any engine saved, at any stage and on any number of ranks."""
        self.load_weights(SavedWeights(tensors))
        parameters = dict(self.model.named_parameters())
        saved = set(tensors.names("optimizer"))  # checkpoints of old versions may lack some before the first step
        for partition in self.partitions:
            self._load_moments(partition, tensors, saved)
        counts = [
            tensors.tensor("optimizer", name) for name in (f"step/{name}" for name in parameters) if name in saved
        ]
        self._updates = int(counts[0].item()) if counts else 0
        self._set_updates()
        restore_random_states_of(self.ranks.rank, tensors, self.device)

    def _saved_partitions(self) -> list[Partition]:
        """What this rank writes to a checkpoint. At stage 0 every rank holds everything, and writes its share of it."""
        if self.stage:
            return self.partitions
        shares = [partition.share(self.ranks.rank, self.ranks.size) for partition in self.partitions]
        return [share for share in shares if share.length]

    def _load_moments(self, partition: Partition, tensors: Tensors, saved: Collection[str]) -> None:
        """Read a partition's moments where `saved`, the names of optimizer tensors, has them."""
        name, start, length = partition.name, partition.start, partition.length
        for key in MOMENTS:
            moments = partition.of(self._state(partition.flat)[key]).values
            if f"{key}/{name}" in saved:
                moments.copy_(tensors.shard("optimizer", f"{key}/{name}", start, length))
            else:
                moments.zero_()

    def _initialize(self, settings: DeepSpeedSettings) -> tuple[Transformer, Any]:
        import deepspeed
        import deepspeed.ops

        if self.device.type == "cpu":  # an operation that would be compiled for most of a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        values = self._passed_on(settings)
        # DeepSpeed 0.19 calls collective operations by the names that they have in older PyTorch.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        with deepspeed.zero.Init(config_dict_or_path=values) if self.stage == 3 else nullcontext():
            model = Transformer(self.config.model)
        model.reset_buffers(self.device)  # in float32: zero.Init makes all tensors in the weights' dtype
        prepare_layers(model, self.config.train, self.config.balance)
        if self.stage == 3:
            # A layer's weights come and go together; DeepSpeed's hooks stay outside what is compiled.
            deepspeed.utils.set_z3_leaf_modules(model, [Layer])
        if compiles(self.config.train, self.device):
            for layer in model.layers:
                layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
        # Without gradients: it keeps slices of the weights, whose autograd nodes could not be captured in a graph.
        with torch.no_grad():
            engine, *_ = deepspeed.initialize(
                model=TrainingLoss(model, self.config.balance, self.dtype, self.ranks.size),
                optimizer=_make_adamw(model, self.config.optimizer, settings.offload_optimizer),
                config=values,
                dist_init_required=False,
            )
        return model, engine

    def _passed_on(self, settings: DeepSpeedSettings) -> dict[str, Any]:
        """The settings for DeepSpeed, but for the work that this engine does itself.

        Where gradients are reduced here, DeepSpeed neither accumulates, clips nor checks them.
        """
        values = settings.values
        if self._reduces_itself:
            zero = {"overlap_comm": False, "contiguous_gradients": False, "compute_grad_norm": self.stage == 0}
            values = values | {
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,
                "bf16": values["bf16"] | {"check_grad_overflow": False},
                "zero_optimization": values["zero_optimization"] | zero,
            }
        batch = values["train_micro_batch_size_per_gpu"] * values["gradient_accumulation_steps"] * self.ranks.size
        return values | {"train_batch_size": batch}

    def _begin(self) -> None:
        """Give every parameter its initial values, and the optimizer the state of before the first update."""
        for flat in flat_groups(self._optimizer, self.stage):
            flat.data.zero_()  # the padding between and behind the parameters, too
            self._adamw.state[flat] = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        self._set_updates()
        for partition in self.partitions:
            values = partition.of(partition.flat).values
            initialise_slice(values, partition.name, self.config.model, self.config.train.seed, partition.start)
        sync_from_masters(self._optimizer, self.stage)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """AdamW itself, which DeepSpeed's own optimizer wraps."""
        return self._engine.basic_optimizer

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        return self._adamw.state[flat]

    def _set_updates(self) -> None:
        is_torchs = isinstance(self._adamw, torch.optim.AdamW)
        for flat in flat_groups(self._optimizer, self.stage):
            count = torch.tensor(float(self._updates), device=flat.device) if is_torchs else self._updates
            self._adamw.state[flat]["step"] = count


def _make_adamw(model: Transformer, config: OptimizerConfig, on_cpu: bool) -> torch.optim.Optimizer:
    with torch.device("meta"):  # whole weights: those that stage 3 has cut up lack their dimensions
        groups = parameter_groups(Transformer(model.config), config, torch.float32)
    decays = {parameter: groups[name].decays for name, parameter in model.named_parameters()}
    param_groups = [
        {"params": [p for p in decays if decays[p]], "weight_decay": config.weight_decay},
        {"params": [p for p in decays if not decays[p]], "weight_decay": 0.0},
    ]
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(param_groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(param_groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
