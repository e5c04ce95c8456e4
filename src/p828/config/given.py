"""Keys that were given and would change nothing: each is refused, with what it needs; so is an empty path."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from p828.config.data_sections import DataConfig, SourceConfig
from p828.config.facts import facts_by_key, facts_of
from p828.config.files import kind_key
from p828.config.rules import check_path
from p828.config.schema import Config
from p828.config.values import flatten, shown
from p828.errors import ConfigError


@dataclass(frozen=True)
class Need:
    keys: tuple[str, ...]
    """Dotted keys; one that ends with a dot stands for all below it."""
    is_met: Callable[[Config], bool]
    """Whether these keys change something."""
    words: str
    """What is accepted; `{config.section.key}` stands for a value."""
    of_flags: bool = False
    """Whether a TOML file may give them all the same, as one that serves several commands does."""

    def names(self, key: str) -> bool:
        return any(key.startswith(own) if own.endswith(".") else key == own for own in self.keys)


NEEDS = (
    Need(("sharded.",), lambda c: c.engine == "sharded", 'accepted with engine = "sharded"'),
    Need(("deepspeed.",), lambda c: c.engine == "deepspeed", 'accepted with engine = "deepspeed"'),
    Need(("schedule.decay_steps",), lambda c: c.schedule.kind == "wsd", 'accepted with schedule.kind = "wsd"'),
    Need(
        ("schedule.min_lr_ratio",),
        lambda c: c.schedule.kind != "constant",
        'accepted with schedule.kind = "cosine" or "wsd"',
    ),
    Need(
        ("schedule.warmup_steps",),
        lambda c: c.schedule.warmup_steps <= c.train.steps,
        "at most train.steps = {config.train.steps} is accepted, where the run ends",
    ),
    Need(
        ("schedule.warmup_steps",),
        lambda c: c.schedule.warmup_steps != c.train.steps or c.schedule.kind == "constant",
        "fewer than train.steps = {config.train.steps} are accepted; no step would be left for the schedule's shape",
        of_flags=True,
    ),
    Need(
        ("tokenizer.vocab_size", "tokenizer.training_megabytes"),
        lambda c: c.tokenizer.name == "train",
        'accepted with tokenizer.name = "train", not "{config.tokenizer.name}", whose vocabulary is its own',
        of_flags=True,
    ),
    Need(
        ("prepare.",),
        lambda c: any(source.prepared for source in c.data.sources),
        "accepted with data.prepared; text that is tokenized on the way is not filtered",
    ),
    Need(
        ("data.shuffle_rows", "data.streams"),
        lambda c: not all(source.prepared for source in c.data.sources),
        "accepted without data.prepared, whose rows are all shuffled together",
        of_flags=True,
    ),
    Need(
        ("data.text_field",),
        lambda c: bool(c.data.mixture) or not c.data.messages_field,
        'accepted without data.messages_field = "{config.data.messages_field}", whose messages are the text',
    ),
    Need(
        ("data.packing",),
        lambda c: not all(source.messages_field for source in c.data.sources),
        "accepted without data.messages_field; a row holds whole conversations, as many as fit",
        of_flags=True,
    ),
    Need(
        tuple(f"data.{own.name}" for own in dataclasses.fields(SourceConfig) if own.name != "prepared"),
        lambda c: not c.data.mixture,
        "accepted without [[data.mixture]], whose sources each have this key",
        of_flags=True,
    ),
    Need(
        tuple(f"model.rope_scaling.{name}" for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")),
        lambda c: c.model.rope_scaling.factor > 1,
        "accepted with model.rope_scaling.factor above 1",
    ),
    Need(
        ("optimizer.decay_embeddings",),
        lambda c: c.optimizer.weight_decay > 0,
        "accepted with optimizer.weight_decay above 0",
    ),
    Need(
        ("evaluation.max_new_tokens", "evaluation.temperature"),
        lambda c: bool(c.evaluation.prompts),
        "accepted with evaluation.prompts",
        of_flags=True,
    ),
    Need(
        ("evaluation.tasks_every", "evaluation.tasks_path"),
        lambda c: bool(c.evaluation.tasks),
        "accepted with evaluation.tasks",
    ),
    Need(("evaluation.patience",), lambda c: c.evaluation.every > 0, "accepted with evaluation.every above 0"),
    Need(
        ("rollback.spike_threshold",),
        lambda c: c.rollback.after_steps > 0,
        "accepted with rollback.after_steps above 0",
    ),
    Need(
        ("rollback.limit",),
        lambda c: c.rollback.after_steps > 0 or c.health.on_critical == "roll_back",
        'accepted with rollback.after_steps above 0 or health.on_critical = "roll_back"',
    ),
    Need(("train.upcycle",), lambda c: bool(c.train.init_from), "accepted with train.init_from"),
    Need(("trackers.trackio_project",), lambda c: c.trackers.trackio, "accepted with trackers.trackio = true"),
    Need(("wandb.project",), lambda c: c.wandb.mode != "off", 'accepted with wandb.mode = "online" or "offline"'),
)


def check_given(config: Config, flags: Collection[str], loaded: Config, in_files: Collection[str]) -> None:
    """Raises ConfigError for a key that changes nothing, of those given by flags or in the user's own files.

    `loaded` is the configuration without the flags. A file's key that has an effect there is accepted. A flag's path
    that is empty is refused, as of a variable of the shell that is not set.
    """
    values = flatten(config)
    for key in ("runs_dir", "train.init_from"):
        if key in flags:
            check_path(key, values[key])
    idle = dict(_idle(config, [*flags, *in_files], flags))
    idle_before = dict(_idle(loaded, in_files, flags=()))
    for key, words in idle.items():
        if key in flags or key in idle_before:
            given = f"{key} = {shown(_plain(values[key]))}" if key in values else key
            raise ConfigError(f"{given}: {words}")


def _idle(config: Config, keys: Collection[str], flags: Collection[str]) -> Iterator[tuple[str, str]]:
    """Keys that change nothing in this configuration, and what is accepted."""
    facts = facts_by_key(Config)
    for key in sorted(set(keys)):
        for need in NEEDS:
            if need.names(key) and not need.is_met(config) and (key in flags or not need.of_flags):
                yield key, need.words.format(config=config)
        kinds = facts_of(facts, key).kinds
        if kinds and not _is_read(config, key, kinds):
            yield key, f"accepted with {kind_key(key)} = " + " or ".join(f'"{kind}"' for kind in kinds)
        table, _, name = key.rpartition(".")
        if name == "text_field" and table != "data" and flatten(config).get(f"{table}.messages_field"):
            yield key, f"accepted without {table}.messages_field, whose messages are the text"


def _is_read(config: Config, key: str, kinds: Collection[str]) -> bool:
    """Whether a key of a source or of the validation, which has an effect with these kinds, has one here."""
    data, (table, _, name) = config.data, key.rpartition(".")
    if data.mixture and table == "data":
        return True  # refused as one of `NEEDS`
    kind = flatten(config).get(kind_key(key))
    if kind is None:  # of a base's mixture, in place of which there is a shorter one
        return True
    return kind in kinds or (table != "data.validation" and _is_validations(data, name))


def _is_validations(data: DataConfig, name: str) -> bool:
    """Whether the validation text is read with this key of a source."""
    if name == "text_field":
        return data.validation.kind != "held_out"
    return name in ("hub_name", "hub_revision", "hub_subset") and data.validation.kind == "split"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
