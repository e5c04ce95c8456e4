"""What a training step does to a model on several devices: DeepSpeed's ZeRO behind the interface of `engine`.

The ranks hold the same step's micro-batches between them. A gradient is the mean over the targets of all of them.
"""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from p828.config import Config
from p828.data.loader import Batch
from p828.distributed.group import ProcessGroup
from p828.engine.deepspeed.partitions import flat_groups, partitions, sync_from_masters
from p828.engine.deepspeed.reduce import GradientReducer
from p828.engine.deepspeed.settings import DeepSpeedSettings, deepspeed_settings
from p828.engine.microbatch import auxiliary_losses
from p828.engine.plain import StepResult, prepare_layers, step_result
from p828.errors import ConfigError
from p828.model.backend import check_widths
from p828.model.init import initial_values
from p828.model.loss import IGNORE, LinearCrossEntropy
from p828.model.transformer import Layer, Transformer
from p828.optim.adamw import decayed_names
from p828.optim.balance import update_biases
from p828.runs.tensors import Saveable, Tensors
from p828.system.device import compiles, pick_device, pick_dtype, random_states, restore_random_states

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_deepspeed(config: Config, ranks: ProcessGroup) -> DeepSpeedSettings:
    """What the run will be told to DeepSpeed. Raises ConfigError if it is not installed or would not take it."""
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
    """Weights in the run's dtype, float32 masters and moments, sharded as the ZeRO stage says."""

    def __init__(self, config: Config, ranks: ProcessGroup, settings: DeepSpeedSettings) -> None:
        self.config, self.ranks, self.stage = config, ranks, settings.stage
        self.device = pick_device(config.train.device)
        self.dtype = pick_dtype(config.train.dtype, self.device)
        torch.manual_seed(config.train.seed + ranks.rank)  # for dropout; a resume brings the state back
        self._accumulation = config.train.gradient_accumulation
        self._done = 0  # micro-batches of the step
        self._updates = 0
        self._sums_itself = self.stage < 2 and not settings.offload_optimizer
        self.model, self._engine = self._initialize(settings)
        self._optimizer = self._engine.optimizer
        self.partitions = partitions(self._optimizer, self.stage, self.model, ranks.rank)
        self._begin()
        self._sums = None
        if self._sums_itself:
            zero = settings.values["zero_optimization"]
            self._sums = GradientReducer(self._optimizer, zero, self.model, config, self.dtype)
            if self.stage == 0:
                parameters = dict(self.model.named_parameters())
                for part in self.partitions:
                    part.flat.grad = self._sums.gradients.sums[parameters[part.name]]
        self.reductions = 1 if self._sums_itself else self._accumulation
        """How often gradients are reduced over ranks in a step."""
        self.reduced_dtype = torch.float32 if self._sums_itself else self.dtype
        self._scale = torch.zeros((), device=self.device)
        layers, experts = config.model.num_hidden_layers, config.model.n_routed_experts
        self._loss = torch.zeros((), device=self.device)
        self._loads_LE = torch.zeros(layers, experts, dtype=torch.int64, device=self.device)

    def forward_backward(self, batch: Batch, num_targets: int) -> None:
        """Add one micro-batch's gradients, for a step of `num_targets` targets on all ranks and in all micro-batches.

        The last one of a step also reduces them over ranks; from stage 2 on, every one does.
        """
        self._done += 1
        is_last = self._done == self._accumulation
        if self._sums is not None:
            self._sums.gradients.scale.fill_(1 / num_targets)
            self._sums.add(batch, is_last)
            return
        self._scale.fill_(self.ranks.size / num_targets)  # DeepSpeed takes the mean over ranks
        batch = batch.to(self.device)
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss, cross_entropy, loads_LE = self._engine(
            batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.document_ids_BS, self._scale
        )
        self._engine.backward(loss, scale_wrt_gas=False)
        self._loss += cross_entropy / self.ranks.size
        self._loads_LE += loads_LE

    def step(self, learning_rate: float) -> StepResult:
        """Clip, update weights and balance bias, unless something is not finite; begin the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        result = self._step_of_hooks() if self._sums is None else self._step_of_sums(self._sums)
        self._updates += result.applied
        self._done = 0
        return result

    def _step_of_sums(self, sums: GradientReducer) -> StepResult:
        """As the plain engine's: all of it is started on the device before the host asks what came out."""
        gradients = sums.gradients
        totals = torch.cat((gradients.loss[None].double(), sums.finish()[None], gradients.loads_LE.flatten().double()))
        dist.all_reduce(totals)
        loss, norm = totals[0], totals[1].sqrt()
        applied = torch.isfinite(loss) & torch.isfinite(norm)
        clip = (self.config.optimizer.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        # What torch's AdamW divides gradients by, and whether it leaves everything as it is.
        self._inner.grad_scale, self._inner.found_inf = (1 / clip).float(), (~applied).float()  # type: ignore[attr-defined]
        self._update(sums)
        loads_LE = totals[2:].long().view_as(gradients.loads_LE)
        update_biases(self.model, loads_LE, self.config.balance.update_rate, applied)
        gradients.begin_step()
        return step_result(torch.cat((loss[None], norm[None], totals[2:])).tolist(), self.config)

    def _update(self, sums: GradientReducer) -> None:
        """Let AdamW loose on the masters, and compute with what comes out."""
        if self.stage == 0:  # whole on every rank, and DeepSpeed would round the sums to the weights' dtype
            self._inner.step()
            sync_from_masters(self._optimizer, self.stage)
            return
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        for number, share in enumerate(sums.shares):
            self._optimizer.averaged_gradients[number] = GradPartitionBufferGroup([share], share)
        self._engine.step()

    def _step_of_hooks(self) -> StepResult:
        """DeepSpeed has reduced the gradients already; it finds their norm, and clips."""
        totals = torch.cat((self._loss[None].double(), self._loads_LE.flatten().double()))
        dist.all_reduce(totals)
        self._engine.step()
        applied = self._engine.was_step_applied()
        norm = float(self._engine.get_global_grad_norm()) if applied else math.nan
        loads_LE = totals[1:].long().view_as(self._loads_LE)
        update_biases(self.model, loads_LE, self.config.balance.update_rate, torch.tensor(applied, device=self.device))
        self._loss.zero_()
        self._loads_LE.zero_()
        loss, *loads = totals.tolist()
        return step_result([loss, norm, *loads], self.config)

    @contextmanager
    def gathered_model(self) -> Iterator[Transformer]:
        """The model with all its weights, on every rank. At stage 3 they are gathered for the block."""
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
        """The model for as many forward passes on every rank. At stage 3 each gathers a layer at a time."""
        if self.stage < 3:
            yield self.model
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([self.model.head_weight]):
            yield self.model

    def state_dict(self) -> dict[str, dict[str, Saveable]]:
        """This rank's share of what a checkpoint needs from here, by file and name; rank 0 has what is whole, too."""
        held = [part.share(self.ranks.rank, self.ranks.size) if self.stage == 0 else part for part in self.partitions]
        held = [part for part in held if part.length]
        model: dict[str, Saveable] = {part.name: part.of(part.flat) for part in held}
        optimizer: dict[str, Saveable] = {
            f"{key}/{part.name}": part.of(self._state(part.flat)[key]) for key in MOMENTS for part in held
        }
        random: dict[str, Saveable] = {}
        for name, state in random_states(self.device).items():
            random[name if self.ranks.is_first else f"{name}/{self.ranks.rank}"] = state
        if self.ranks.is_first:
            parameters = dict(self.model.named_parameters())
            model |= {name: value for name, value in self.model.state_dict().items() if name not in parameters}
            optimizer |= {f"step/{name}": torch.tensor(float(self._updates)) for name in parameters}
        return {"model": model, "optimizer": optimizer, "random": random}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Take over what an engine saved, of either kind, at any stage, on any number of ranks."""
        parameters = dict(self.model.named_parameters())
        buffers = {name: buffer for name, buffer in self.model.state_dict().items() if name not in parameters}
        for name, buffer in buffers.items():
            buffer.copy_(tensors.tensor("model", name))
        saved = set(tensors.names("optimizer"))  # older ones from before the first step have not all
        for part in self.partitions:
            part.of(part.flat).values.copy_(tensors.shard("model", part.name, part.start, part.length))
            for key in MOMENTS:
                moments, moments_name = part.of(self._state(part.flat)[key]).values, f"{key}/{part.name}"
                if moments_name in saved:
                    moments.copy_(tensors.shard("optimizer", moments_name, part.start, part.length))
                else:
                    moments.zero_()
        counts = [
            tensors.tensor("optimizer", name) for name in (f"step/{name}" for name in parameters) if name in saved
        ]
        self._updates = int(counts[0].item()) if counts else 0
        self._set_updates()
        sync_from_masters(self._optimizer, self.stage)
        own = {name.partition("/")[0]: name for name in tensors.names("random") if _rank_of(name) == self.ranks.rank}
        if own:  # with more ranks than before, the new ones draw from seeds of their own
            restore_random_states({name: tensors.tensor("random", key) for name, key in own.items()}, self.device)

    def _initialize(self, settings: DeepSpeedSettings) -> tuple[Transformer, Any]:
        import deepspeed
        import deepspeed.ops

        if self.device.type == "cpu":  # an operation that would be compiled for most of a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        values = self._own_part(settings)
        # DeepSpeed 0.19 calls collective operations by the names that they have in older PyTorch.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        with deepspeed.zero.Init(config_dict_or_path=values) if self.stage == 3 else nullcontext():
            model = Transformer(self.config.model)
        model.reset_buffers(self.device)  # in float32: zero.Init makes all tensors in the weights' dtype
        prepare_layers(model, self.config)
        if self.stage == 3:
            # A layer's weights come and go together; DeepSpeed's hooks stay outside what is compiled.
            deepspeed.utils.set_z3_leaf_modules(model, [Layer])
        if compiles(self.config.train, self.device):
            for layer in model.layers:
                layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
        with torch.no_grad():  # it keeps slices of the weights, and with them autograd's nodes, which defy recording
            engine, *_ = deepspeed.initialize(
                model=TrainingLoss(model, self.config, self.dtype),
                optimizer=_adamw(model, self.config, settings.offload_optimizer),
                config=values,
                dist_init_required=False,
            )
        return model, engine

    def _own_part(self, settings: DeepSpeedSettings) -> dict[str, Any]:
        """The settings, less what is not left to DeepSpeed: where it gets summed gradients, all that leads to them."""
        values = settings.values
        if self._sums_itself:
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
        """Give every parameter its first values, and the optimizer a state without any past."""
        for flat in flat_groups(self._optimizer, self.stage):
            flat.data.zero_()  # padding, too
            self._inner.state[flat] = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        self._set_updates()
        by_name = {part.name: part for part in self.partitions}
        for name, whole in initial_values(self.config.model, self.config.train.seed):
            if name in by_name:
                part = by_name[name]
                part.of(part.flat).values.copy_(whole.flatten()[part.start : part.start + part.length])
        sync_from_masters(self._optimizer, self.stage)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """AdamW itself."""
        return self._engine.basic_optimizer

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        return self._inner.state[flat]

    def _set_updates(self) -> None:
        is_torchs = isinstance(self._inner, torch.optim.AdamW)
        for flat in flat_groups(self._optimizer, self.stage):
            count = torch.tensor(float(self._updates), device=flat.device) if is_torchs else self._updates
            self._inner.state[flat]["step"] = count


class TrainingLoss(nn.Module):
    """What DeepSpeed wraps: a micro-batch in, its share of the step's loss out."""

    def __init__(self, model: Transformer, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.config, self.dtype = model, config, dtype
        self.head_loss = HeadLoss(model)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor, positions_BS: Tensor, document_ids_BS: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What to differentiate, the cross-entropy in it, and the loads (L, E); the first two times `scale`."""
        valid_BS = targets_BS != IGNORE
        output = self.model(tokens_BS, positions_BS, document_ids_BS, dtype=self.dtype, valid_BS=valid_BS)
        cross_entropy = self.head_loss(output.hidden_BSH.flatten(0, 1), targets_BS.flatten(), scale)
        loss = cross_entropy + sum(auxiliary_losses(output.router, self.config.balance, scale))
        return loss, cross_entropy.detach(), output.router.loads_LE


class HeadLoss(nn.Module):
    """The head's weight with its use: stage 3 fetches a module's own weights when the module is called."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.weight = model.head_weight

    def forward(self, hidden_TH: Tensor, targets_T: Tensor, scale: Tensor) -> Tensor:
        return LinearCrossEntropy.apply(hidden_TH, self.weight, targets_T, scale)


def _adamw(model: Transformer, config: Config, on_cpu: bool) -> torch.optim.Optimizer:
    with torch.device("meta"):  # with the weights' dimensions, which those that stage 3 has cut up lack
        names = decayed_names(Transformer(config.model), config.optimizer)
    own = config.optimizer
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in names) == decays], "weight_decay": decay}
        for decays, decay in ((True, own.weight_decay), (False, 0.0))
    ]
    if on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=own.learning_rate, betas=own.betas, eps=own.eps)
    return torch.optim.AdamW(groups, lr=own.learning_rate, betas=own.betas, eps=own.eps, fused=True)


def _rank_of(name: str) -> int:
    """Whose random state it is: "cuda" rank 0's, "cuda/3" rank 3's."""
    return int(name.partition("/")[2] or 0)
