"""What a run measures of its model while it trains: the validation loss, and how the model continues the prompts."""

import dataclasses
import math
from dataclasses import dataclass

from p828.config import Config
from p828.data.batch import Batch
from p828.data.tokenizer import Tokenizer
from p828.distributed.group import ProcessGroup
from p828.engine.plain import Engine
from p828.errors import NotFinite
from p828.inference.evaluate import evaluate
from p828.inference.generate import generate
from p828.inference.sampling import SamplingConfig
from p828.runs.records import Recorder
from p828.runs.train_state import TrainState
from p828.train.console import A_WAIT, SECONDS_PER_LINE, Console

FAR_FROM_GUESSING = 2.0  # times the loss of equal shares for all tokens; a model's first losses are near that


@dataclass
class Evaluations:
    """Measures, records and shows; every rank takes part, with batches of its own."""

    config: Config
    tokenizer: Tokenizer
    batches: list[Batch]
    """The validation rows, the same on all ranks."""
    engine: Engine
    recorder: Recorder
    console: Console
    ranks: ProcessGroup
    is_first: bool = True
    """Whether none was made since this start."""

    def make(self, progress: TrainState) -> bool:
        """Measure the validation loss, sample the prompts and note both in `progress`; True for the best loss so far.

        After a step that was not applied, or from a model that has diverged, no loss is the best.
        """
        after = A_WAIT if self.is_first else SECONDS_PER_LINE
        self.is_first = False
        with (
            self.console.waiting(f"step {progress.step}: evaluating", after),
            self.engine.model_for_evaluation() as model,
        ):
            result = evaluate(model, self.own_batches(), self.engine.dtype, self.ranks.all_reduce)
        samples = self.samples(progress.step)
        is_sound = progress.non_finite_steps == 0 and self.is_sound(result.loss, progress.step)
        is_better = is_sound and result.loss < (math.inf if progress.best_loss is None else progress.best_loss)
        progress.validation_loss = result.loss
        if progress.non_finite_steps == 0:
            progress.evaluations_since_best = 0 if is_better else progress.evaluations_since_best + 1
        if is_better:
            progress.best_loss, progress.best_step = result.loss, progress.step
        self.recorder.write("eval", progress.step, **dataclasses.asdict(result), best=is_better)
        self.console.evaluation(progress.step, loss=result.loss, perplexity=result.perplexity, best=is_better)
        if self.config.data.mixture:
            self.console.sources(self.config.data.source_names, progress.source_tokens)
        if samples:
            self.recorder.write("sample", progress.step, samples=[list(sample) for sample in samples])
            self.console.preview(samples)
        return is_better

    def is_sound(self, loss: float, step: int) -> bool:
        """Whether a model that has not diverged may have this validation loss; tells it if not."""
        guessing = math.log(self.config.model.vocab_size)
        if loss <= FAR_FROM_GUESSING * guessing:
            return True
        text = "is no finite number"
        if math.isfinite(loss):
            text = f"is {loss:.3g}, far above the {guessing:.2f} of guessing"
        self.tell("diverged", step, f"step {step}: the validation loss {text}: the run has diverged")
        return False

    def own_batches(self) -> list[Batch]:
        """The batches whose number modulo the ranks is this rank's.

        A rank that has one batch less than others gets another one without targets, as all have to join in.
        """
        own = self.batches[self.ranks.rank :: self.ranks.size]
        missing = math.ceil(len(self.batches) / self.ranks.size) - len(own)
        return own + [self.batches[0].without_targets()] * missing

    def samples(self, step: int) -> list[tuple[str, str]]:
        """Each prompt with its continuation; nothing on ranks but the first."""
        config = self.config.evaluation
        if not config.prompts:
            return []
        sampling = SamplingConfig(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
        prompts = list(config.prompts)
        with self.engine.gathered_model() as model:
            if not self.ranks.is_first:
                return []
            try:
                completions = generate(model, self.tokenizer, prompts, sampling, dtype=self.engine.dtype)
            except NotFinite:
                text = "the prompts are not continued: the model's logits are no finite numbers"
                self.tell("no_samples", step, text)
                return []
        return [(prompt, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]

    def tell(self, event: str, step: int, text: str) -> None:
        """Record something, and show it."""
        self.recorder.write("event", step, event=event, text=text)
        self.console.event(text)
