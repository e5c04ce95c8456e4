"""A configuration with what follows from the keys given, prepared data and the model that a run starts from."""

from collections.abc import Collection
from dataclasses import replace

from p828.config import Config, validate, with_steps
from p828.config.files import Loaded
from p828.config.given import check_given
from p828.distributed.engine_of_processes import for_processes, with_settled_engine
from p828.distributed.launcher import Process, report_once
from p828.errors import ConfigError


def settled(
    config: Config, given: Collection[str], loaded: Loaded, process: Process, reads_prepared: bool = True
) -> Config:
    """`config`, which is `loaded` changed by the keys `given`, with what follows from them for `process`, validated.

    With `reads_prepared`, complete prepared data says what it was made from, where that is not given; so does the model
    that a run starts from. Raises ConfigError, also for a key that is given and changes nothing.
    """
    config = with_settled_engine(config, {*given, *loaded.given}, process)
    config = _with_length(config, given)
    if config.train.init_from:
        from p828.train.log.console import waiting  # imports rich's progress bars

        with waiting(f"reading the settings of {config.train.init_from}", lambda text: report_once([text])):
            from p828.interchange.inherited_settings import with_origin  # imports PyTorch

            config = with_origin(config, {*given, *loaded.given}, reads_prepared)
    if reads_prepared and any(source.prepared for source in config.data.sources):
        from p828.data.tokens.settings import with_prepared_sources  # with what it reads tokens by

        config = with_prepared_sources(config, {*given, *loaded.given})
    validate(config)
    check_given(with_steps(for_processes(config, process.size), 1), given, loaded.config, loaded.given)
    return config


def _with_length(config: Config, given: Collection[str]) -> Config:
    """Where `train.steps` is given, it decides and not the file's `train.tokens`. Raises ConfigError for both."""
    train = config.train
    if not train.tokens or "train.steps" not in given:
        return config
    if "train.tokens" in given:
        raise ConfigError(
            f"train.steps = {train.steps} and train.tokens = {train.tokens:g} are both given: one of them decides; "
            "give one"
        )
    return replace(config, train=replace(train, tokens=0.0))
