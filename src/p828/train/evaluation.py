"""What a run measures of its model while it trains: the validation loss, and how the model continues the prompts."""

import math
from dataclasses import dataclass

from p828.config import EvaluationConfig
from p828.data.batch import Batch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.distributed.group import ProcessGroup
from p828.engine.interface import Engine
from p828.errors import ConfigError, NotFinite
from p828.inference.answer import answer, asked, prompt_ids
from p828.inference.evaluate import evaluate
from p828.inference.generate import generate
from p828.inference.sampling_config import SamplingConfig
from p828.runs.train_state import TrainState
from p828.train.log.console import A_WAIT, SECONDS_PER_LINE
from p828.train.log.log import Log

FAR_FROM_GUESSING = 2.0  # times the loss of equal shares for all tokens; a model's first losses are near that


@dataclass
class Evaluator:
    """Measures the model and logs what it found; every rank takes part, with its slice of the validation batches."""

    config: EvaluationConfig
    vocab_size: int
    """The model's."""
    tokenizer: Tokenizer
    batches: list[Batch]
    """The validation batches, the same on all ranks."""
    engine: Engine
    log: Log
    ranks: ProcessGroup
    is_chat: bool = False
    """Whether the prompts are messages, to be answered and not continued."""
    is_first: bool = True
    """Whether none was made since this start."""

    def run(self, state: TrainState) -> bool:
        """Measure the validation loss, sample the prompts and note both in `state`; True for the best loss so far.

        After a step that was not applied, or from a model that has diverged, no loss is the best.
        """
        after = A_WAIT if self.is_first else SECONDS_PER_LINE
        self.is_first = False
        with (
            self.log.console.waiting(f"step {state.step}: evaluating", after),
            self.engine.model_for_evaluation() as model,
        ):
            result = evaluate(model, self.own_batches(), self.engine.dtype, self.ranks.all_reduce)
        with self.log.console.waiting(f"step {state.step}: continuing the prompts", after):
            samples = self.samples(state.step)
        is_sound = state.non_finite_steps == 0 and self.is_sound(result.loss, state.step)
        is_best = is_sound and result.loss < (math.inf if state.best_loss is None else state.best_loss)
        state.validation_loss = result.loss
        if state.non_finite_steps == 0:
            state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
        if is_best:
            state.best_loss, state.best_step = result.loss, state.step
        self.log.evaluation(state, result, is_best)
        self.log.samples(state.step, samples)
        return is_best

    def is_sound(self, loss: float, step: int) -> bool:
        """Whether a model that has not diverged may have this validation loss; logs an event if not."""
        guessing = math.log(self.vocab_size)
        if loss <= FAR_FROM_GUESSING * guessing:
            return True
        text = "is no finite number"
        if math.isfinite(loss):
            text = f"is {loss:.3g}, far above the {guessing:.2f} of guessing"
        self.log.event("diverged", step, f"step {step}: the validation loss {text}: the run has diverged")
        return False

    def own_batches(self) -> list[Batch]:
        """This rank's slice of the validation batches.

        Every rank must run the same number of forward passes, so short ranks get a dummy batch without targets.
        """
        own = self.batches[self.ranks.rank :: self.ranks.size]
        missing = math.ceil(len(self.batches) / self.ranks.size) - len(own)
        return own + [self.batches[0].without_targets()] * missing

    def samples(self, step: int) -> list[tuple[str, str]]:
        """Each prompt with its continuation, or its answer; nothing on ranks but the first."""
        config = self.config
        if not config.prompts:
            return []
        sampling = SamplingConfig(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
        prompts = list(config.prompts)
        with self.engine.model_for_any_passes() as model:
            if not self.ranks.is_first:
                return []
            try:
                if self.is_chat:
                    completions = answer(model, self.tokenizer, asked(prompts), sampling, dtype=self.engine.dtype)
                else:
                    completions = generate(model, self.tokenizer, prompts, sampling, dtype=self.engine.dtype)
            except NotFinite:
                text = "the prompts are not continued: the model's logits are no finite numbers"
                self.log.event("no_samples", step, text)
                return []
        return [(prompt, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]


def check_prompts(config: EvaluationConfig, tokenizer: Tokenizer, context: int, is_chat: bool) -> None:
    """Raises ConfigError for a prompt too long for the model, which would end the run at its first evaluation."""
    for prompt in config.prompts:
        length = len(prompt_ids(tokenizer, prompt) if is_chat else tokenizer.encode(prompt))
        if length >= context:
            raise ConfigError(
                f"evaluation.prompts: {prompt[:40]!r} has {length} tokens: "
                f"fewer than model.max_position_embeddings = {context} are accepted"
            )
