"""What rules need to know of a run's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from p828.config import Config, ScheduleConfig
from p828.model.costs import count_parameters, parameters_by_part
from p828.optim.schedule import learning_rate


@dataclass(frozen=True)
class Facts:
    """A run's settings, as far as rules ask for them. The defaults are those of a run of which nothing is known."""

    run: str = "RUN"
    """The run's directory, as a command names it."""
    steps: int = 0
    """Of the whole run; 0 if not known."""
    layers: int = 1
    experts: int = 1
    """Routed experts of a layer."""
    experts_per_token: int = 1
    vocab_size: int = 0
    """Rows of the embedding; 0 if not known."""
    active_parameters: int = 0
    """Those that a token uses; 0 if not known."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Parameters by part of the model, as `p828.model.costs` counts them."""
    norm_topk_prob: bool = True
    mask_documents: bool = True
    dropout: float = 0.0
    dtype: str = "auto"
    engine: str = "plain"
    recomputes: bool = False
    """Whether the backward pass computes the layers again."""
    gradient_accumulation: int = 1
    tokens_per_step: int = 0
    """On each rank; 0 if not known."""
    peak_rate: float = 0.0
    """Peak learning rate; 0 if not known."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_grad_norm: float = 1.0
    balance_rate: float = 1e-3
    sequence_loss_weight: float = 0.0
    z_loss_weight: float = 0.0
    is_from_scratch: bool = True
    """Whether the first weights were drawn, and not another model's."""
    mixture_steps: tuple[int, ...] = (0,)
    """Steps after which the weights of the data's sources change."""
    evaluation_every: int = 0
    has_tasks: bool = False
    """Whether the run stops now and then to be measured at tasks, which takes minutes."""
    checkpoint_every: int = 0
    keep_last: int = 0
    """Checkpoints that are kept, the best one besides."""
    hang_seconds: float = 1800.0
    """Time without progress after which the run's watchdog ends it."""
    rollback_after: int = 0

    @staticmethod
    def of(config: Config, run: Path | None = None) -> "Facts":
        """The facts in a configuration; `run` is its directory if that is not the configuration's."""
        model, train = config.model, config.train
        return Facts(
            run=str(run or config.run_dir),
            steps=train.steps,
            layers=model.num_hidden_layers,
            experts=model.n_routed_experts,
            experts_per_token=model.num_experts_per_tok,
            vocab_size=model.vocab_size,
            active_parameters=count_parameters(model).active,
            numbers=parameters_by_part(model)._asdict(),
            norm_topk_prob=model.norm_topk_prob,
            mask_documents=model.mask_documents,
            dropout=model.dropout,
            dtype=train.dtype,
            engine=config.engine,
            recomputes=train.gradient_checkpointing,
            gradient_accumulation=train.gradient_accumulation,
            tokens_per_step=config.tokens_per_step,
            peak_rate=config.optimizer.learning_rate,
            schedule=config.schedule,
            max_grad_norm=config.optimizer.max_grad_norm,
            balance_rate=config.balance.update_rate,
            sequence_loss_weight=config.balance.sequence_loss_weight,
            z_loss_weight=config.balance.z_loss_weight,
            is_from_scratch=not train.init_from,
            mixture_steps=config.data.mixture_steps,
            evaluation_every=config.evaluation.every,
            has_tasks=bool(config.evaluation.tasks),
            checkpoint_every=config.checkpoint.every,
            keep_last=config.checkpoint.keep_last,
            hang_seconds=float(config.timeout_seconds),
            rollback_after=config.rollback.after_steps,
        )

    def learning_rate(self, step: int) -> float | None:
        """What the schedule says for a step, counted from 1; None if it is not known."""
        if not self.peak_rate or not self.steps:
            return None
        return learning_rate(step - 1, self.steps, self.peak_rate, self.schedule)
