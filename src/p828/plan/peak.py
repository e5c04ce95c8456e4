"""When in a step most memory is taken, and by what."""

from dataclasses import dataclass, replace

from p828.config import Config
from p828.plan.activations import INT32, INT64, Kept, Sizes, backward, forward, kept, weight_gradients
from p828.plan.state import BFLOAT16, FLOAT32, Setup, State, training_state

LOSS_CHUNK_TOKENS, LOSS_COLUMNS = 4096, 64  # model/backend.py's, on a GPU
SEGMENTS = 4  # engine/deepspeed/reduce.py's
WORKSPACE = 32 * 2**20  # cuBLAS's on Hopper and later, for each thread that starts products and each stream
FRAGMENTATION = 0.05  # of a micro-batch's memory: gaps between the allocator's blocks, see docs/plan.md


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the moment of a step when most is taken, by part."""

    weights: int
    masters: int
    gradients: int
    """The float32 sums over a step; and DeepSpeed's buckets, in which they are reduced."""
    moments: int
    activations: int
    """What the layers keep for the backward pass, and what the moment's operation needs beside it."""
    weight_gradients: int
    """Of one micro-batch, in bfloat16, not added to the sums yet."""
    logits: int
    """A chunk of them, and what is formed beside it."""
    gathered: int
    """Weights that ZeRO stage 3 has gathered for the moment."""
    workspace: int
    """cuBLAS's."""
    recordings: int
    """CUDA graphs' own tensors: the batches that they read."""
    fragmentation: int
    """Gaps that PyTorch's allocator has reserved and cannot use."""
    moment: str
    """When it is."""

    @property
    def allocated(self) -> int:
        """As `torch.cuda.max_memory_allocated`."""
        return self.reserved - self.fragmentation

    @property
    def reserved(self) -> int:
        """As `torch.cuda.max_memory_reserved`."""
        return sum(value for value in vars(self).values() if isinstance(value, int))


def peak(config: Config, setup: Setup, micro_batch_size: int) -> Memory:
    """The memory of training with micro-batches of this size. `config.model.vocab_size` is the model's, not 0."""
    state = training_state(config.model, config.optimizer, setup)
    step = _MicroBatch(config, setup, Sizes.of(config, micro_batch_size))
    found = max((step.forward(), step.loss(), step.first_backward(), step.last_backward()), key=lambda m: m.reserved)
    return _with_state(found, state, config, setup)


def _with_state(memory: Memory, state: State, config: Config, setup: Setup) -> Memory:
    bucket = config.deepspeed.reduce_bucket_size * BFLOAT16
    buckets = bucket * (3 if config.deepspeed.overlap_comm else 2) if reduces_by_hooks(setup) else 0
    micro_batch = memory.reserved
    return replace(
        memory,
        weights=state.weights,
        masters=state.masters,
        gradients=state.gradients + buckets,
        moments=state.moments,
        fragmentation=round(FRAGMENTATION * micro_batch),
    )


def reduces_by_hooks(setup: Setup) -> bool:
    """Whether DeepSpeed's hooks reduce every micro-batch's gradients, in place of p828 a step's sums."""
    return setup.stage is not None and (setup.stage >= 2 or setup.offload_optimizer)


@dataclass(frozen=True)
class _MicroBatch:
    """One micro-batch on its way; each method is a moment of it, without the state."""

    config: Config
    setup: Setup
    sizes: Sizes

    def forward(self) -> Memory:
        """In the routed experts of the last layer."""
        others = (self._layers - 1) * sum(self._kept)
        whole = kept(self.sizes, recomputes=False, has_auxiliary_losses=self._has_auxiliary_losses)
        layer = sum(whole) - whole.shared + forward(self.sizes)
        return self._memory("forward pass of the last layer", others + layer + self._ends(1))

    def loss(self) -> Memory:
        """In a chunk of the loss: the layers have kept all, and the gradient of their output is being made."""
        return self._memory(
            "loss", self._layers * sum(self._kept) + self._ends(3), logits=self._logits()
        )  # fmt: skip

    def first_backward(self) -> Memory:
        """In the backward pass of the last layer, the first to be gone through."""
        activations = self._layers * sum(self._kept) + self._ends(2) + self._backward()
        head = BFLOAT16 * self._vocabulary if reduces_by_hooks(self.setup) else 0
        return self._memory("backward pass of the last layer", activations, weight_gradients=head)

    def last_backward(self) -> Memory:
        """In the backward pass of the first layer, when the others' weight gradients have all been made."""
        activations = sum(self._kept) + self._ends(2) + self._backward()
        if reduces_by_hooks(self.setup):
            gradients = weight_gradients(self.config) + BFLOAT16 * self._vocabulary  # and the embedding's
        else:
            is_in_segments = self.setup.stage is not None and self.setup.ranks > 1 and not self._has_auxiliary_losses
            layers = -(-self._layers // SEGMENTS) if is_in_segments else self._layers
            gradients = (layers - 1) * weight_gradients(self.config)
        return self._memory("backward pass of the first layer", activations, weight_gradients=gradients)

    def _memory(self, moment: str, activations: int, logits: int = 0, weight_gradients: int = 0) -> Memory:
        tokens = INT64 * 3 * self.sizes.T + INT32 * self.sizes.T
        angles = FLOAT32 * self.sizes.T * self.sizes.D
        bounds = (2 * INT32 + 2) * self.sizes.T
        is_captured = not (self.config.train.gradient_checkpointing or reduces_by_hooks(self.setup))
        return Memory(
            weights=0,
            masters=0,
            gradients=0,
            moments=0,
            activations=activations + tokens + angles + bounds,
            weight_gradients=weight_gradients,
            logits=logits,
            gathered=self._gathered(),
            workspace=WORKSPACE * (4 if is_captured else 2),
            recordings=tokens if is_captured else 0,
            fragmentation=0,
            moment=moment,
        )

    def _ends(self, more: int) -> int:
        """(T, H) tensors outside the layers: the embedded tokens, which wait for their gradient, and `more` others."""
        return (more + 1) * self.sizes.residual

    def _logits(self) -> int:
        rows = min(LOSS_CHUNK_TOKENS, self.sizes.T)
        vocabulary = self.config.model.vocab_size
        columns = -(-vocabulary // LOSS_COLUMNS) * LOSS_COLUMNS
        chunk = BFLOAT16 * rows * columns
        if columns > vocabulary:  # the head's weight filled up with rows of zeros, and the last rows' gradient
            chunk += self.sizes.H * (BFLOAT16 * columns + FLOAT32 * LOSS_COLUMNS)
        if reduces_by_hooks(self.setup):  # the head's gradient: summed in float32, then rounded
            return FLOAT32 * self._vocabulary + max(chunk, BFLOAT16 * self._vocabulary)
        return chunk

    def _gathered(self) -> int:
        if self.setup.stage != 3 or self.setup.ranks == 1:
            return 0
        most = STAGE_3_LIVE
        from p828.model.costs import count_parameters

        return BFLOAT16 * min(count_parameters(self.config.model).total, most)

    def _backward(self) -> int:
        return backward(self.sizes, self._kept, self._recomputes)

    @property
    def _kept(self) -> Kept:
        return kept(self.sizes, self._recomputes, self._has_auxiliary_losses)

    @property
    def _recomputes(self) -> bool:
        return self.config.train.gradient_checkpointing

    @property
    def _has_auxiliary_losses(self) -> bool:
        return bool(self.config.balance.sequence_loss_weight or self.config.balance.z_loss_weight)

    @property
    def _layers(self) -> int:
        return self.config.model.num_hidden_layers

    @property
    def _vocabulary(self) -> int:
        """Numbers of the output head."""
        return self.config.model.vocab_size * self.config.model.hidden_size


STAGE_3_LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters
