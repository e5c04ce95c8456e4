"""Every setting of a run, as frozen dataclasses: made from files (`files`), changed by flags, checked once (`rules`).

A field says here all that is true of it by itself: its default, whether a run that has a checkpoint keeps it (`fixed`)
or may change it (`changeable`), its range and the rest of `Facts`. Its docstring is the command line's help. Those of
text and tokens are in `data_sections`. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from p828.config.data_sections import DataConfig, PrepareConfig, TokenizerConfig
from p828.config.facts import changeable, fixed


@dataclass(frozen=True)
class RopeScaling:
    factor: float = changeable(1.0, at_least=1)
    """YaRN's context extension s; 1 is plain RoPE."""
    original_max_position_embeddings: int = changeable(2048, at_least=1)
    """Context, in tokens, that the unscaled frequencies were trained for."""
    beta_fast: float = changeable(32.0, above=0)
    """Dimensions that turn at least this often over the original context keep their frequency."""
    beta_slow: float = changeable(1.0, above=0)
    """Dimensions that turn at most this often over the original context are interpolated fully."""


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = fixed(0, at_least=0)
    """Rows of the embedding and of the output head; 0 takes the tokenizer's vocabulary, up to a multiple of 128."""
    hidden_size: int = fixed(512, at_least=1)
    """Width of the residual stream."""
    moe_intermediate_size: int = fixed(768, at_least=1)
    """Inner width of one expert."""
    num_hidden_layers: int = fixed(1, at_least=1)
    """Transformer layers."""
    num_attention_heads: int = fixed(8, at_least=1)
    """Query heads."""
    num_key_value_heads: int = fixed(2, at_least=1)
    """Key and value heads; each serves an equal share of the query heads."""
    head_dim: int = fixed(64, at_least=1)
    """Width of one head; even, for RoPE."""
    use_qk_norm: bool = fixed(False)
    """RMSNorm on each head's queries and keys before RoPE."""
    attention_sinks: bool = fixed(True)
    """One learned logit a head in the softmax's denominator."""
    attention_backend: Literal["auto", "reference", "flash"] = changeable("auto")
    """`reference` is plain math, `flash` is fused; `auto` takes the fused one where the device has it."""
    mask_documents: bool = fixed(True)
    """Documents packed into one sequence do not attend to each other."""
    max_position_embeddings: int = changeable(4096, at_least=1)
    """Longest context in tokens, in training and in generation."""
    rope_theta: float = fixed(10000.0, above=1)
    """RoPE's base."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    n_routed_experts: int = fixed(4, at_least=1)
    """Experts the router chooses from, in every layer."""
    n_shared_experts: int = fixed(1, at_least=0)
    """Experts applied to every token, computed as one of this many times the width."""
    num_experts_per_tok: int = fixed(2, at_least=1)
    """Routed experts chosen for a token."""
    n_group: int = fixed(1, at_least=1)
    """Groups the routed experts are split into."""
    topk_group: int = fixed(1, at_least=1)
    """Groups a token may choose from."""
    scoring_func: Literal["sigmoid", "softmax"] = fixed("sigmoid")
    """How router logits become scores."""
    norm_topk_prob: bool = fixed(True)
    """Normalise the chosen experts' weights to sum to one."""
    routed_scaling_factor: float = fixed(1.0, above=0)
    """Factor on the routed experts' weights."""
    hidden_act: Literal["swiglu", "swiglu_of_product"] = fixed("swiglu")
    """`swiglu`: silu(W1 x) * W3 x. `swiglu_of_product`: SwiGLU over the halves of W1 x * W3 x, both twice as wide."""
    dropout: float = changeable(0.0, at_least=0, below=1)
    """Fraction of an expert's inner activations dropped in training."""
    rms_norm_eps: float = fixed(1e-5, above=0)
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = fixed(False)
    """Use the embedding as the output head."""
    initializer_range: float = fixed(0.02, above=0)
    """Standard deviation of the initial weights."""


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = changeable(3e-4, above=0)
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = changeable((0.9, 0.95))
    """Decay of the first and second moment."""
    eps: float = changeable(1e-8, above=0)
    """Added to the root of the second moment."""
    weight_decay: float = changeable(0.01, at_least=0)
    """Decoupled decay of matrices; norms, biases and sinks have none."""
    decay_embeddings: bool = changeable(False)
    """Decay the embedding too."""
    max_grad_norm: float = changeable(1.0, above=0)
    """Gradients are scaled down to this global norm."""
    moment_dtype: Literal["auto", "float32", "bfloat16"] = changeable("auto", with_deepspeed=("auto", "float32"))
    """Dtype of AdamW's moments. bfloat16 needs a bfloat16 run without DeepSpeed; `auto` takes it there on CUDA."""


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["cosine", "constant", "wsd"] = changeable("cosine")
    """Shape after the linear warm-up; `wsd` is warm-up, stable, linear decay."""
    warmup_steps: int = changeable(2000, at_least=0)
    """Steps of linear warm-up."""
    decay_steps: int = changeable(0, at_least=0)
    """Last steps over which `wsd` decays."""
    min_lr_ratio: float = changeable(0.1, at_least=0, at_most=1)
    """Where `cosine` ends and `wsd` falls to, as a fraction of the peak."""


@dataclass(frozen=True)
class BalanceConfig:
    update_rate: float = changeable(1e-3, at_least=0)
    """Change of an expert's selection bias after a step."""
    sequence_loss_weight: float = changeable(0.0, at_least=0)
    """Weight of the sequence-wise auxiliary loss, for comparison."""
    z_loss_weight: float = changeable(0.0, at_least=0)
    """Weight of the router's z-loss, for comparison."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = changeable(100_000, at_least=1)
    """Optimizer updates in the whole run."""
    tokens: float = changeable(0.0, at_least=0)
    """Tokens of the whole run, on all ranks, as 5e9: decides `train.steps`, rounded up, where it is not 0."""
    hours: float = changeable(0.0, at_least=0)
    """Hours of training, over all its starts, after which the run is complete, whatever `train.steps`; 0: no limit."""
    micro_batch_size: int = changeable(8, at_least=1)
    """Sequences put through the model at once, on each rank."""
    gradient_accumulation: int = changeable(16, at_least=1)
    """Micro-batches of a step, on each rank; the global batch is this times the micro-batch size times the ranks."""
    seed: int = fixed(0, at_least=0)
    """Seed of the weights, the data order and dropout."""
    init_from: str = fixed("")
    """Start from these weights: a run's or a checkpoint's directory, or a model's in the hub's layout."""
    upcycle: bool = fixed(False)
    """The model of `init_from` is dense: every expert becomes a copy of its layer's MLP, or a slice of one."""
    device: Literal["auto", "cpu", "cuda"] = changeable("auto")
    """`auto` takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = changeable("auto")
    """Arithmetic of the layers; master weights and router are float32. `auto`: bfloat16 on CUDA, float32 on a CPU."""
    compile: Literal["auto", "on", "off"] = changeable("auto")
    """torch.compile; `auto` compiles on CUDA."""
    gradient_checkpointing: bool = changeable(False)
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    deterministic: bool = changeable(False)
    """Only algorithms that give bit-equal results when repeated: p828's kernels all do, and cost no more for it."""


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = changeable(500, at_least=0)
    """Steps between evaluations; 0 evaluates at the end only."""
    rows: int = changeable(64, at_least=1)
    """Validation sequences, the same at every evaluation."""
    prompts: tuple[str, ...] = changeable((), is_prose=True)
    """Prompts continued at every evaluation; of a run on conversations alone, messages that are answered."""
    max_new_tokens: int = changeable(64, at_least=1)
    """Tokens sampled for each prompt."""
    temperature: float = changeable(0.8, at_least=0)
    """Temperature of those samples; 0 is greedy."""
    patience: int = changeable(0, at_least=0)
    """Stop after this many evaluations without a better validation loss; 0 never stops early."""
    tasks: tuple[str, ...] = changeable(())
    """Tasks that are measured besides: cloze_english, cloze_python, or names of lm-eval."""
    tasks_every: int = changeable(0, at_least=0)
    """Steps between measurements at the tasks; 0 measures at the end only."""
    tasks_path: str = changeable("")
    """Directory of further tasks, in lm-eval's format."""
    bigram_baseline: bool = changeable(False)
    """Also compute what a bigram model of one epoch of training tokens, held in memory, gets on the validation text."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = changeable(1000, at_least=1)
    """Steps between checkpoints; the last step always makes one."""
    keep_last: int = changeable(3, at_least=1)
    """Newest checkpoints kept; the best one is kept besides."""


@dataclass(frozen=True)
class RollbackConfig:
    after_steps: int = changeable(0, at_least=0)
    """Anomalous steps in a row after which the run goes back to a checkpoint and skips the data since; 0: never."""
    spike_threshold: float = changeable(1.0, above=0, old_name="spike_nats")
    """A step is anomalous whose loss is this many nats above the recent average, or is not finite."""
    limit: int = changeable(3, at_least=1)
    """Maximum number of rollbacks; the run stops at the next one."""


@dataclass(frozen=True)
class ShardedConfig:
    stage: int = changeable(1, at_least=1, at_most=3)
    """ZeRO: 1 partitions the optimizer's state over the ranks, 2 the gradients too, 3 the weights too."""
    stage_chosen_for: int = changeable(0, at_least=0)
    """Processes that p828 chose the stage for; 0 for a stage that was given. For others p828 chooses again."""
    shard_within: Literal["all", "host"] = changeable("all")
    """Shard over `all` ranks; or over those of each `host`, with a replica of the model on every host (HSDP)."""
    timeout_seconds: int = changeable(1800, at_least=1)
    """Longest time without progress: then every rank's stack is written down and the run ended."""


@dataclass(frozen=True)
class HealthConfig:
    on_critical: Literal["continue", "stop", "roll_back"] = changeable("continue")
    """At a critical finding: go on, stop, or go back to a checkpoint before it where that helps."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    config: str = changeable("")
    """A DeepSpeed configuration (a .json file, or zero1, zero2, zero3, zero3-offload) over the keys below."""
    stage: int = changeable(1, at_least=0)
    """ZeRO: 0 partitions nothing over the ranks, 1 the optimizer's state, 2 the gradients too, 3 the weights too."""
    offload_optimizer: Literal["none", "cpu"] = changeable("none")
    """`cpu` keeps the optimizer's state in main memory and updates there; from stage 1 on."""
    offload_param: Literal["none", "cpu"] = changeable("none")
    """`cpu` keeps the weights in main memory and fetches each layer's for its use; stage 3 only."""
    reduce_bucket_size: int = changeable(50_000_000, at_least=1)
    """Gradients, in numbers, that are reduced together."""
    allgather_bucket_size: int = changeable(500_000_000, at_least=1)
    """Updated weights, in numbers, that are gathered together."""
    overlap_comm: bool = changeable(True)
    """Reduce gradients while the backward pass goes on."""
    timeout_seconds: int = changeable(1800, at_least=1)
    """Longest time without progress: then every rank's stack is written down and the run ended."""


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["off", "online", "offline"] = changeable("off")
    """Weights & Biases: `online` needs an account, `offline` writes into the run's directory."""
    project: str = changeable("p828")
    """Weights & Biases project."""


@dataclass(frozen=True)
class TrackersConfig:
    tensorboard: bool = changeable(False)
    """Write TensorBoard's event files into the run's directory; needs p828[tensorboard]."""
    trackio: bool = changeable(False)
    """Record with trackio, on this machine or where its variables TRACKIO_... say; needs p828[trackio]."""
    trackio_project: str = changeable("p828")
    """trackio's project."""


@dataclass(frozen=True)
class Config:
    name: str = changeable("")
    """The run's name; empty means the configuration's."""
    runs_dir: str = changeable("runs")
    """Directory that holds the runs."""
    engine: Literal["plain", "sharded", "deepspeed"] = changeable("plain")
    """`plain` trains on one device; `sharded` and `deepspeed` on one or more, each with a process of its own."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    rollback: RollbackConfig = field(default_factory=RollbackConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    sharded: ShardedConfig = field(default_factory=ShardedConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def timeout_seconds(self) -> int:
        """Longest time that ranks go without progress."""
        return self.deepspeed.timeout_seconds if self.engine == "deepspeed" else self.sharded.timeout_seconds

    @property
    def tokens_per_step(self) -> int:
        """On each rank."""
        return self.train.micro_batch_size * self.train.gradient_accumulation * self.data.sequence_length
