"""When in a step most memory is taken, and by what.

While a micro-batch goes forward, each layer adds what it keeps; on the way back each lets go of that, and adds its
weights' gradients, which `engine/microbatch.py` adds to the step's sums when the backward pass has ended. Both are even
over the layers, so the most is taken at one of four moments: in the last layer's forward pass, in the loss, in the last
layer's backward pass or in the first layer's.
"""

from dataclasses import dataclass, fields, replace

from p828.config import Config
from p828.model.costs import count_parameters
from p828.plan.activations import INT32, INT64, Kept, Sizes, backward, forward, kept, weight_gradients
from p828.plan.setup import Setup
from p828.plan.state import BFLOAT16, FLOAT32, State, training_state
from p828.plan.tensors import layer_shapes, parameter_shapes
from p828.plan.units import Units, units_of

LOSS_CHUNK_TOKENS, LOSS_COLUMNS = 4096, 64  # model/backend.py's, on a GPU
SEGMENTS = 4  # engine/deepspeed/reduce.py's
SUB_GROUP = 10**9  # numbers that DeepSpeed's stage 3 updates together
WORKSPACE = 32 * 2**20  # cuBLAS's on Hopper and later, for each thread that starts products and each stream
FRAGMENTATION, HOLES = 0.065, 500 * 10**6  # of a micro-batch's memory, and bytes besides: measured, see docs/plan.md
EVALUATED_LOGIT = BFLOAT16 + 2 * FLOAT32  # bytes of a logit in model/loss.py's linear_cross_entropy
CONTEXT = 750 * 2**20  # of the driver and compiled kernels, outside PyTorch's count: measured
GRAPHS, KERNELS, GRAPH_NODE = 2, 50, 64 * 2**10  # captured graphs, kernels of a layer, and bytes of one in a graph
COMMUNICATION = 2**30  # of NCCL with several GPUs, likewise


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU when most is taken, by part."""

    weights: int = 0
    masters: int = 0
    gradients: int = 0
    """The float32 sums over a step."""
    moments: int = 0
    activations: int = 0
    """What the layers keep for the backward pass, and what the moment's operation needs beside it."""
    weight_gradients: int = 0
    """Of one micro-batch, in bfloat16, before they are added to the sums."""
    logits: int = 0
    """A chunk of the loss, and what is formed beside it."""
    buckets: int = 0
    """In which gradients are reduced over ranks, from stage 2 on."""
    gathered: int = 0
    """Weights that stage 3 has gathered."""
    workspace: int = 0
    """cuBLAS's."""
    recordings: int = 0
    """CUDA graphs of the two kinds of micro-batch, outside PyTorch's count. Their tensors are counted above."""
    fragmentation: int = 0
    """Gaps that PyTorch's allocator has reserved and cannot use."""
    evaluation: int = 0
    """Beside a captured graph, whose memory stays reserved: what an evaluation takes."""
    context: int = 0
    """Outside PyTorch: the driver's, compiled kernels, and NCCL's."""
    moment: str = ""
    """When in a step it is."""

    @property
    def allocated(self) -> int:
        """As `torch.cuda.max_memory_allocated` of training steps."""
        return self.reserved - self.fragmentation

    @property
    def reserved(self) -> int:
        """As `torch.cuda.max_memory_reserved` of training steps."""
        return self.total - self.evaluation - self.context - self.recordings

    @property
    def total(self) -> int:
        """Of a run on the GPU."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "moment"}


def peak(config: Config, setup: Setup, micro_batch_size: int) -> Memory:
    """The memory of training with micro-batches of this size. `config.model.vocab_size` is the model's, not 0."""
    step = _Step(config, setup, Sizes.of(config, micro_batch_size))
    moments = [step.forward(), step.loss(), step.last_layer_backward(), step.first_layer_backward(), step.update()]
    most = max(moments, key=lambda memory: memory.total)
    state = training_state(config.model, config.optimizer, setup)
    return replace(
        most,
        **state._asdict(),
        fragmentation=round(FRAGMENTATION * most.total) + HOLES,
        evaluation=step.evaluation(),
        recordings=step.recordings(),
        context=CONTEXT + (COMMUNICATION if setup.ranks > 1 else 0),
    )


def copy_for_saving(state: State) -> int:
    """Bytes of the copy that a checkpoint is written from beside the training, where there is room for it."""
    return state.weights + state.masters + state.moments


@dataclass(frozen=True)
class _Step:
    """A step's moments, each as what it takes beside the state."""

    config: Config
    setup: Setup
    sizes: Sizes

    def forward(self) -> Memory:
        """In the last layer's routed experts, which need most; the shared ones come after them."""
        whole = kept(self.sizes, recomputes=False, has_auxiliary_losses=self._has_auxiliary_losses)
        layer = sum(whole) - whole.shared + forward(self.sizes)
        return self._micro_batch("last layer's forward pass", (self._layers - 1) * sum(self._kept) + layer, 1)

    def loss(self) -> Memory:
        """In a chunk of the loss: beside its logits are the last sum and norm, and the gradient that is being made."""
        return self._micro_batch("loss", self._layers * sum(self._kept), 3, logits=self._logits())

    def last_layer_backward(self) -> Memory:
        """The first to be gone through, while all layers' activations are there."""
        head = BFLOAT16 * self._head if self.setup.reduces_by_hooks else 0
        activations = self._layers * sum(self._kept) + self._backward()
        ends = 0 if self.setup.is_sharded else 2  # the loss's hidden states and their gradient, else held until the end
        return self._micro_batch("last layer's backward pass", activations, ends, 0, head, is_backward=True)

    def first_layer_backward(self) -> Memory:
        """The last to be gone through, while the gradients of the other layers' weights wait to be added."""
        gradients = (self._layers_in_a_segment() - 1) * weight_gradients(self.config)
        if self.setup.reduces_by_hooks:  # then those of one layer, and the embedding's
            gradients = weight_gradients(self.config) + BFLOAT16 * self._head
        activations = sum(self._kept) + self._backward()
        return self._micro_batch("first layer's backward pass", activations, 2, 0, gradients, is_backward=True)

    def update(self) -> Memory:
        """Stage 3 copies the gradients that it updates with."""
        if self.setup.engine != "deepspeed" or self.setup.stage != 3 or self.setup.offload_optimizer:
            return Memory()
        numbers = min(count_parameters(self.config.model).total // self.setup.ranks, SUB_GROUP)
        return Memory(activations=FLOAT32 * numbers, buckets=self._buckets(is_backward=False), moment="update")

    def evaluation(self) -> int:
        """A layer's forward pass, then the loss of one row, without a graph; 0 where the micro-batch's memory serves.

        The loss of a row makes float32 logits and their log-softmax beside the bfloat16 ones. It uses what the layer
        left to the allocator if one of its blocks is large enough for them.
        """
        if not self._is_captured:
            return 0
        layer = self.sizes.routed + forward(self.sizes)
        rows = min(LOSS_CHUNK_TOKENS, self.config.data.sequence_length)
        logits = rows * self.config.model.vocab_size
        loss = EVALUATED_LOGIT * logits
        is_reused = self.sizes.routed >= FLOAT32 * logits
        return (max(layer, loss) if is_reused else layer + loss) + 4 * self.sizes.residual

    def recordings(self) -> int:
        """A graph of the step's first micro-batch, and one of all others."""
        layers = self.config.model.num_hidden_layers + 1  # and all that is around them
        return GRAPHS * layers * KERNELS * GRAPH_NODE if self._is_captured else 0

    def _micro_batch(
        self,
        moment: str,
        activations: int,
        residuals: int,
        logits: int = 0,
        weight_gradients: int = 0,
        is_backward: bool = False,
    ) -> Memory:
        """Beside the layers are `residuals` (T, H) tensors, the batch, rotary angles, and bounds and flags of tokens.

        And the embedded tokens, which wait for their gradient where p828 adds it up.
        """
        batch = (3 * INT64 + INT32) * self.sizes.T
        residuals += not self.setup.reduces_by_hooks
        if self.setup.is_sharded:  # autograd's graph is cut between layers, where what a layer adds is kept too
            residuals += self._layers + 1
        beside = residuals * self.sizes.residual + FLOAT32 * self.sizes.T * self.sizes.D
        bounds = (2 * INT32 + 2) * self.sizes.T
        graph_batches = GRAPHS * batch if self._is_captured else batch
        return Memory(
            activations=activations + graph_batches + beside + bounds,
            weight_gradients=weight_gradients,
            logits=logits,
            buckets=self._buckets(is_backward),
            gathered=self._gathered(),
            workspace=WORKSPACE * (4 if self._is_captured else 2),
            moment=moment,
        )

    def _logits(self) -> int:
        """The head's weight is filled up with rows of zeros to whole columns, if need be."""
        rows, vocabulary = min(LOSS_CHUNK_TOKENS, self.sizes.T), self.config.model.vocab_size
        columns = -(-vocabulary // LOSS_COLUMNS) * LOSS_COLUMNS
        chunk = BFLOAT16 * rows * columns
        if columns > vocabulary:
            chunk += self.sizes.H * (BFLOAT16 * columns + FLOAT32 * LOSS_COLUMNS)
        if self.setup.reduces_by_hooks:  # the head's gradient is summed in float32, then rounded
            return FLOAT32 * self._head + max(chunk, BFLOAT16 * self._head)
        return chunk

    def _buckets(self, is_backward: bool) -> int:
        """Of the sharded engine: what layers send and receive, in turns.

        Of DeepSpeed: stage 3 has one all the time, and what it scatters beside it; others have one or two in the
        backward pass alone, and a copy of what is reduced.
        """
        if self.setup.is_sharded:
            numbers = 2 * self._units.layer_buffers if (self.setup.stage or 0) >= 2 else 0
        elif not self.setup.reduces_by_hooks:
            numbers = 0
        elif self.setup.stage == 3:
            numbers = self.setup.bucket_numbers * (2 if is_backward else 1)
        else:
            numbers = self.setup.bucket_numbers * ((3 if self.setup.has_two_buckets else 2) if is_backward else 0)
        return BFLOAT16 * numbers

    def _gathered(self) -> int:
        """Of the sharded engine: its buffers. Of DeepSpeed: all weights, or as many as may be live beside a layer."""
        if self.setup.stage != 3:
            return 0
        if self.setup.is_sharded:
            return self.setup.computed_bytes * (self._units.layer_buffers + max(self._units.ends))
        if self.setup.ranks == 1 and not self.setup.offload_param:
            return 0
        layer = sum(one.numbers for one in layer_shapes(self.config.model))
        numbers = min(count_parameters(self.config.model).total, self.setup.live_numbers + layer)
        return self.setup.computed_bytes * numbers

    def _layers_in_a_segment(self) -> int:
        """Of the backward pass, after which gradients are added to the sums."""
        if self.setup.is_sharded:
            return 1
        is_whole = self.setup.stage is None or self.setup.ranks == 1 or self._has_auxiliary_losses
        return self._layers if is_whole else -(-self._layers // SEGMENTS)

    def _backward(self) -> int:
        return backward(self.sizes, self._kept, self._recomputes)

    @property
    def _units(self) -> Units:
        return units_of(parameter_shapes(self.config.model), self.setup.shards)

    @property
    def _kept(self) -> Kept:
        return kept(self.sizes, self._recomputes, self._has_auxiliary_losses)

    @property
    def _recomputes(self) -> bool:
        return self.config.train.gradient_checkpointing

    @property
    def _is_captured(self) -> bool:
        return not (self._recomputes or self.setup.reduces_by_hooks or self.config.train.compile == "off")

    @property
    def _has_auxiliary_losses(self) -> bool:
        return bool(self.config.balance.sequence_loss_weight or self.config.balance.z_loss_weight)

    @property
    def _layers(self) -> int:
        return self.config.model.num_hidden_layers

    @property
    def _head(self) -> int:
        """Numbers of the output head."""
        return self.config.model.vocab_size * self.config.model.hidden_size
