"""What makes a configuration wrong beyond its types: ranges, and values that do not go together."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from p828.config.data_sections import DataConfig, TokenizerConfig
from p828.config.facts import LARGEST_INT, Facts, facts_by_key, facts_of
from p828.config.resolve import with_steps
from p828.config.schema import Config, DeepSpeedConfig, ModelConfig, ScheduleConfig
from p828.config.values import flatten, shown
from p828.errors import ConfigError

LONGEST_NAME = 200  # bytes of UTF-8; file systems take 255, and other names are made of it
LONGEST_PATH = 3500  # bytes of UTF-8; systems take 4,095, and longer paths are made of it
LONGEST_PART = 255  # bytes between two slashes
MOST_TEXT = 2**25  # bytes in all, escaped: some hundred thousand file names


def validate(config: Config) -> None:
    """Check what types cannot say. Raises ConfigError with the first key that is wrong and what it accepts."""
    flat, facts = flatten(config), facts_by_key(Config)
    for key, value in flat.items():
        check_range(key, value, facts_of(facts, key))
    check_texts(flat, facts)
    check_model(config.model)
    check_run(with_steps(config, 1))


def check_range(key: str, value: Any, facts: Facts) -> None:
    """Raises ConfigError for a number outside its field's range."""
    if type(value) in (int, float) and not facts.accepts(value):
        raise ConfigError(f"{key} = {shown(value)}: {facts.accepted(type(value))} is accepted")


def check_texts(flat: Mapping[str, Any], facts: Mapping[str, Facts]) -> None:
    """Raises ConfigError for a text that cannot be a file's name, and for more text than a reader of it takes."""
    size = 0
    for key, value in flat.items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                size += len(json.dumps(text)) + 8  # no less than it takes in TOML
                if not facts_of(facts, key).is_prose:
                    check_text(key, text)
    if size > MOST_TEXT:
        raise ConfigError(
            f"the configuration has {size:,} bytes of text: at most {MOST_TEXT:,} are accepted; globs name many files"
        )


def check_text(key: str, text: str) -> None:
    """Raises ConfigError if the text cannot be a file's name on any system."""
    if "\0" in text:
        raise ConfigError(f"{key} = {shown(text)}: text without NUL characters is accepted")
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{key} = {shown(text)}: valid Unicode text is accepted") from None
    if len(content) > LONGEST_PATH:
        raise ConfigError(f"{key} = {shown(text)}: at most {LONGEST_PATH:,} bytes are accepted, not {len(content):,}")
    longest = max(map(len, content.split(b"/")))
    if longest > LONGEST_PART:
        raise ConfigError(
            f"{key} = {shown(text)}: at most {LONGEST_PART} bytes between two slashes are accepted, not {longest:,}"
        )


def check_path(key: str, text: str) -> None:
    """Raises ConfigError for an empty text, which would mean the working directory, and as `check_text`."""
    if not text:
        raise ConfigError(f"{key} is empty: a path is accepted; the working directory is .")
    check_text(key, text)


def check_model(model: ModelConfig) -> None:
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads = {model.num_key_value_heads}: "
            f"it must divide model.num_attention_heads = {model.num_attention_heads}"
        )
    if model.head_dim % 2:
        raise ConfigError(f"model.head_dim = {model.head_dim}: an even number is accepted (RoPE turns pairs)")
    if model.num_experts_per_tok > model.n_routed_experts:
        raise ConfigError(
            f"model.num_experts_per_tok = {model.num_experts_per_tok}: "
            f"at most model.n_routed_experts = {model.n_routed_experts} is accepted"
        )
    if model.n_routed_experts % model.n_group:
        raise ConfigError(
            f"model.n_group = {model.n_group}: it must divide model.n_routed_experts = {model.n_routed_experts}"
        )
    if model.topk_group > model.n_group:
        raise ConfigError(f"model.topk_group = {model.topk_group}: at most model.n_group = {model.n_group} is accepted")
    group_size = model.n_routed_experts // model.n_group
    if model.n_group > 1 and group_size < 2:
        raise ConfigError(
            f"model.n_group = {model.n_group}: a group is scored by its two best experts, "
            f"so at most {model.n_routed_experts // 2} groups of {model.n_routed_experts} experts are accepted"
        )
    if model.num_experts_per_tok > group_size * model.topk_group:
        raise ConfigError(
            f"model.num_experts_per_tok = {model.num_experts_per_tok}: at most {group_size * model.topk_group} is "
            f"accepted, the experts in the model.topk_group = {model.topk_group} groups of a token"
        )
    scaling = model.rope_scaling
    if scaling.beta_slow >= scaling.beta_fast:
        raise ConfigError(
            f"model.rope_scaling.beta_slow = {scaling.beta_slow}: "
            f"a number below model.rope_scaling.beta_fast = {scaling.beta_fast} is accepted"
        )


def check_run(config: Config) -> None:
    data, model = config.data, config.model
    if config.train.steps > LARGEST_INT:
        raise ConfigError(f"train.tokens is {config.train.steps:.3g} steps: at most {LARGEST_INT:,} are accepted")
    check_name(config.name)
    if data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length = {data.sequence_length}: "
            f"at most model.max_position_embeddings = {model.max_position_embeddings} is accepted"
        )
    check_data(data)
    check_engine(config)
    shortest, longest = config.prepare.min_characters, config.prepare.max_characters
    if 0 < longest < shortest:
        raise ConfigError(
            f"prepare.max_characters = {longest}: at least prepare.min_characters = {shortest} is accepted"
        )
    check_tokenizer(config.tokenizer)
    check_schedule(config.schedule, config.train.steps)
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(
            f"optimizer.betas = {list(config.optimizer.betas)}: two numbers of at least 0 and below 1 are accepted"
        )


def check_name(name: str) -> None:
    """Raises ConfigError if the run's name cannot be that of a directory."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"name = {name[:80]!r}: one directory name is accepted")
    if len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        raise ConfigError(f"name = {name[:80]!r}…: at most {LONGEST_NAME} bytes are accepted")


def check_tokenizer(tokenizer: TokenizerConfig) -> None:
    if len(tokenizer.eos_token) < 2:  # of one letter it would end a document wherever that stands
        raise ConfigError(
            f"tokenizer.eos_token = {tokenizer.eos_token!r}: a token of at least two characters is accepted, "
            "one that text does not become"
        )
    if tokenizer.name == "train" and tokenizer.vocab_size < 257:
        raise ConfigError(
            f"tokenizer.vocab_size = {tokenizer.vocab_size}: at least 257 (256 bytes and the end token) is accepted"
        )


def check_schedule(schedule: ScheduleConfig, steps: int) -> None:
    """`steps` are those of the whole run."""
    if schedule.kind == "wsd" and schedule.decay_steps == 0:
        raise ConfigError('schedule.decay_steps = 0: with schedule.kind = "wsd", at least 1 is accepted')
    if schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        raise ConfigError(
            f"schedule.decay_steps = {schedule.decay_steps}: with schedule.warmup_steps = {schedule.warmup_steps} "
            f"it exceeds train.steps = {steps}"
        )


def check_engine(config: Config) -> None:
    if config.deepspeed.config and config.engine != "deepspeed":
        raise ConfigError(f'deepspeed.config = "{config.deepspeed.config}": accepted with engine = "deepspeed"')
    facts = facts_by_key(Config)
    for key, value in flatten(config).items():
        own = facts_of(facts, key)
        accepted = {"deepspeed": own.with_deepspeed, "sharded": own.with_sharded}.get(config.engine)
        if accepted and value not in accepted:
            words = " or ".join(f'"{one}"' for one in accepted)
            raise ConfigError(f'{key} = "{value}": with engine = "{config.engine}", {words} is accepted')
    check_deepspeed(config.deepspeed)
    if config.engine == "deepspeed":
        check_offload(config.deepspeed)


def remarks(config: Config) -> list[str]:
    """A line for each setting that is accepted and hardly meant. `train.steps` is the run's: `with_steps`."""
    model, warmup, steps = config.model, config.schedule.warmup_steps, config.train.steps
    found = []
    if warmup > steps:  # given by a file: check_given
        found.append(f"the run ends at step {steps:,}, within the {warmup:,} steps of its warm-up")
    if model.num_experts_per_tok == 1 < model.n_routed_experts and model.norm_topk_prob:
        found.append(
            "model.num_experts_per_tok = 1 with model.norm_topk_prob = true: every token's weight is 1, so the loss "
            "does not teach the router; with model.norm_topk_prob = false it does"
        )
    return found


def check_deepspeed(deepspeed: DeepSpeedConfig) -> None:
    if deepspeed.stage > 3:
        raise ConfigError(f"deepspeed.stage = {deepspeed.stage}: 0, 1, 2 or 3 is accepted")


def check_offload(deepspeed: DeepSpeedConfig) -> None:
    if deepspeed.config:  # may have another stage
        return
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if getattr(deepspeed, key) != "none" and deepspeed.stage < least:
            raise ConfigError(
                f'deepspeed.{key} = "{getattr(deepspeed, key)}": with deepspeed.stage = {deepspeed.stage}, '
                '"none" is accepted'
            )


def check_data(data: DataConfig) -> None:
    for i, source in enumerate(data.sources):
        where = f"data.mixture[{i}]." if data.mixture else "data."
        if source.source == "files" and not source.files:
            raise ConfigError(f'{where}files is empty: with {where}source = "files", give at least one glob')
        if source.source == "hf" and not source.hub_name:
            raise ConfigError(f'{where}hub_name is empty: with {where}source = "hf", give a data set\'s name')
        check_conversations(source, where)
        if data.validation.kind == "split" and source.source != "hf" and not data.validation.hub_name:
            raise ConfigError(
                f'data.validation.kind = "split": accepted with {where}source = "hf" or data.validation.hub_name'
            )
    if data.validation.kind == "files" and not data.validation.files:
        raise ConfigError('data.validation.files is empty: with data.validation.kind = "files", give at least one glob')
    if data.validation.kind == "held_out" and not 0 < data.validation.fraction < 1:
        raise ConfigError(
            f"data.validation.fraction = {data.validation.fraction}: a fraction between 0 and 1 is accepted"
        )
    check_mixture(data)


def check_conversations(source: DataConfig, where: str) -> None:
    given = f'{where}messages_field = "{source.messages_field}"'
    if source.messages_field and source.source == "python":
        raise ConfigError(f'{given}: accepted with {where}source = "files" or "hf"')
    if source.messages_field and source.prepared:
        raise ConfigError(f"{given}: accepted without {where}prepared; conversations are tokenized while training")


def check_mixture(data: DataConfig) -> None:
    steps, names = data.mixture_steps, [mixed.name for mixed in data.mixture]
    if data.mixture and data.prepared:
        raise ConfigError(
            "data.prepared: with data.mixture, each source has its own: data.mixture[0].prepared and so on"
        )
    if not data.mixture and len(steps) > 1:
        raise ConfigError(f"data.mixture_steps = {list(steps)}: accepted with data.mixture")
    directories = [mixed.prepared for mixed in data.mixture if mixed.prepared]
    if len(set(directories)) < len(directories):
        raise ConfigError("data.mixture: two sources have the same directory as prepared")
    if not steps or steps[0] != 0 or any(later <= before for before, later in itertools.pairwise(steps)):
        raise ConfigError(f"data.mixture_steps = {list(steps)}: 0 and then greater and greater steps are accepted")
    for i, mixed in enumerate(data.mixture):
        if not mixed.name or names.count(mixed.name) > 1:
            raise ConfigError(f"data.mixture[{i}].name = {mixed.name!r}: a name of its own is accepted")
        if len(mixed.weights) != len(steps) or not all(0 <= weight < float("inf") for weight in mixed.weights):
            raise ConfigError(
                f"data.mixture[{i}].weights = {list(mixed.weights)}: {len(steps)} of at least 0 are accepted, "
                f"one for each of data.mixture_steps = {list(steps)}"
            )
    for step, weights in zip(steps, zip(*(mixed.weights for mixed in data.mixture), strict=True), strict=False):
        if sum(weights) == 0:
            raise ConfigError(f"data.mixture: from step {step} on, all weights are 0: at least one above 0 is accepted")
