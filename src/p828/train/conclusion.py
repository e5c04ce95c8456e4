"""What a run says when it is over."""

from p828.data.bigram import bigram_loss
from p828.data.build import training_rows
from p828.data.mixture import held_out_rules
from p828.errors import ConfigError, TransientReadError
from p828.inference.evaluate import perplexity
from p828.runs.layout import name_of
from p828.train.trainer import Trainer


def conclude(trainer: Trainer) -> None:
    """Say what came out: losses, the bigram baseline, samples, and where the run is."""
    config, progress, console = trainer.config, trainer.progress, trainer.console
    loss = progress.validation_loss
    if loss is not None:
        console.print(f"validation loss {loss:.3f}, perplexity {perplexity(loss):.1f}")
    if progress.cut_documents:
        share = progress.cut_documents / progress.documents
        console.print(f"of {progress.documents:,} documents, {share:.1%} were cut into several rows")
    if config.evaluation.bigram_baseline and trainer.ranks.is_first:
        _compare_with_bigram(trainer)
    if config.evaluation.prompts:
        with console.waiting("continuing the prompts"):
            samples = trainer.evaluations.samples(progress.step)
        if samples:
            console.samples(samples)
    how = "stopped early, out of patience,"
    if progress.step >= config.train.steps:
        how = "is complete"
    elif trainer.is_out_of_time():
        how = f"is complete after train.hours = {config.train.hours:g}"
    console.print(f"{config.run_dir} {how} at step {progress.step}")
    if progress.saved_best_step not in (None, progress.step):
        best = trainer.checkpoints / name_of(progress.saved_best_step)
        is_best_of_all = progress.best_step == progress.saved_best_step
        with_loss = f", with validation loss {progress.best_loss:.3f}," if is_best_of_all else ""
        console.print(f"the best checkpoint{with_loss} is {best}")


def _compare_with_bigram(trainer: Trainer) -> None:
    """Tell the baseline's loss. It reads an epoch of text, more than the run may have read, which can fail."""
    try:
        with trainer.console.waiting("counting pairs of tokens for the bigram baseline"):
            rules = held_out_rules(trainer.loader.state_dict())
            rows = training_rows(trainer.config, trainer.tokenizer, rules)
            bigram = bigram_loss(rows, trainer.evaluations.batches, trainer.tokenizer.vocab_size)
    except (ConfigError, TransientReadError) as error:
        trainer.tell("no_bigram_baseline", f"there is no bigram baseline: {error}")
        return
    trainer.recorder.write("event", trainer.progress.step, event="bigram_baseline", loss=bigram)
    trainer.console.print(f"a bigram model of the same tokens gets {bigram:.3f}")
