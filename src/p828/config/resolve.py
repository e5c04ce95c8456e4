"""Settings that follow from others."""

import dataclasses

from p828.config.schema import Config

VOCABULARY_MULTIPLE = 128  # matrix products are fast with such sizes


def with_steps(config: Config, ranks: int) -> Config:
    """With the `train.steps` that `train.tokens` asks for, if it does, so that steps alone say how long a run is."""
    if not config.train.tokens:
        return config
    steps = -(-int(config.train.tokens) // (config.tokens_per_step * ranks))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=max(steps, 1), tokens=0.0))


def with_vocabulary(config: Config, vocab_size: int = 0) -> Config:
    """The configuration with a `model.vocab_size` of 0 replaced: by a tokenizer's `vocab_size` rounded up.

    Before there is a tokenizer, `tokenizer.vocab_size` stands for it. A number that was given stays.
    """
    if config.model.vocab_size:
        return config
    rows = rounded_vocabulary(vocab_size or config.tokenizer.vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=rows))


def rounded_vocabulary(vocab_size: int) -> int:
    """Rows of the model's embedding for a tokenizer of `vocab_size` tokens."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
