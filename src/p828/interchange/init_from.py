"""What a new run takes over from the model that it starts from (`train.init_from`), besides the weights: its settings.

Reads no weights. `origin` does, once the run begins.
"""

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path

from p828.config import RUN_FILE, Config, ModelConfig, RopeScaling, TokenizerConfig, load
from p828.config.values import shown
from p828.errors import ConfigError

# Fields of a model that decide which tensors it has, and what their numbers mean.
SHAPES = (
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "use_qk_norm", "attention_sinks", "n_routed_experts", "n_shared_experts",
    "hidden_act", "tie_word_embeddings",
)  # fmt: skip
# Those that a dense model says nothing about, where it is upcycled.
OF_EXPERTS = (
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip
OF_A_TOKENIZER = ("name", "vocab_size", "eos_token")


def with_origin(config: Config, given: Collection[str]) -> Config:
    """The configuration with the settings of the model that it starts from, but for the keys that the user has given.

    `given` are dotted keys. A configuration that was written by p828, as a run's own, has these settings already. A run
    that has a checkpoint takes its own: the model that it began from may be gone. Raises ConfigError and DataError.
    """
    if "train.init_from" not in given:
        return config
    own = _own(config)
    if own is not None:
        return _with_settings(config, own, given)
    from p828.interchange.origin import settings_of  # imports torch

    origin = settings_of(Path(config.train.init_from))
    _check_tokenizer(config, origin.tokenizer, given)
    config = _with_settings(config, origin, given, OF_EXPERTS if config.train.upcycle else ())
    check_shapes(config, origin.model)
    return config


def check_shapes(config: Config, origin: ModelConfig) -> None:
    """Raises ConfigError, in a line, unless the weights of `origin` are those of the configured model, or become it."""
    if config.train.upcycle:
        check_upcycling(config, origin)
    ignored = (*OF_EXPERTS, "moe_intermediate_size") if config.train.upcycle else ()
    model = config.model
    others = [
        f"model.{name} = {shown(getattr(model, name))} and there {shown(getattr(origin, name))}"
        for name in SHAPES
        if name not in ignored and getattr(model, name) != getattr(origin, name)
    ]
    if not others:
        return
    hint = ""
    if is_dense(origin) and not is_dense(model) and not config.train.upcycle:
        hint = "; a dense model becomes experts with train.upcycle = true"
    raise ConfigError(f"train.init_from = {config.train.init_from}: another model: {', '.join(others)}{hint}")


def is_dense(model: ModelConfig) -> bool:
    """Whether a layer is one MLP: one expert with the weight 1, and none besides."""
    has_one = model.n_routed_experts == model.num_experts_per_tok == 1 and model.n_shared_experts == 0
    return has_one and model.norm_topk_prob and model.routed_scaling_factor == 1


def check_upcycling(config: Config, origin: ModelConfig) -> None:
    """Raises ConfigError unless `origin` is dense and the configured model can begin as the same function."""
    model, where = config.model, "with train.upcycle = true"
    if not is_dense(origin):
        raise ConfigError(
            f"train.upcycle = true: {config.train.init_from} is no dense model (n_routed_experts = "
            f"{origin.n_routed_experts}, n_shared_experts = {origin.n_shared_experts}): leave it out"
        )
    if model.n_routed_experts == 1:
        raise ConfigError(f"model.n_routed_experts = 1: {where}, more than one is accepted")
    if not model.norm_topk_prob:
        raise ConfigError(f"model.norm_topk_prob = false: {where}, true is accepted: the weights sum to a fixed number")
    inner, dense = model.moe_intermediate_size, origin.moe_intermediate_size
    if dense % inner:
        raise ConfigError(f"model.moe_intermediate_size = {inner}: {where}, the dense model's {dense} or a part of it")
    slices = dense // inner
    for name, value in (
        ("n_routed_experts", model.n_routed_experts),
        ("num_experts_per_tok", model.num_experts_per_tok),
        ("n_routed_experts / model.n_group", model.n_routed_experts // model.n_group),
    ):
        if value % slices:
            raise ConfigError(
                f"model.{name} = {value}: {where} and model.moe_intermediate_size = {inner}, a multiple of {slices} is "
                f"accepted: the {slices} slices of the dense model's {dense} are chosen together"
            )


def _own(config: Config) -> Config | None:
    """The configuration of the run itself, if it has begun from the same model and has a checkpoint."""
    path = config.run_dir / RUN_FILE
    if not path.is_file() or not any((config.run_dir / "checkpoints").glob("step_*")):
        return None
    own = load(str(path))
    return own if own.train.init_from == config.train.init_from else None


def _with_settings(config: Config, origin: Config, given: Collection[str], kept: Collection[str] = ()) -> Config:
    """With the model and the tokenizer of `origin`, but for what is given, and for the model's fields in `kept`."""
    own = set(kept) | {key.removeprefix("model.") for key in given if key.startswith("model.")}
    if not config.model.vocab_size:
        own.discard("vocab_size")
    taken = {f.name: getattr(origin.model, f.name) for f in fields(ModelConfig) if f.name not in own}
    taken["rope_scaling"] = _scaling(config.model.rope_scaling, origin.model, given)
    tokenizer = config.tokenizer
    if not any(data.prepared for data in config.data.sources):  # which says with which one it was made
        of_origin = {
            name: getattr(origin.tokenizer, name) for name in OF_A_TOKENIZER if f"tokenizer.{name}" not in given
        }
        tokenizer = replace(tokenizer, **of_origin)
    return replace(config, model=replace(config.model, **taken), tokenizer=tokenizer)


def _scaling(scaling: RopeScaling, origin: ModelConfig, given: Collection[str]) -> RopeScaling:
    """Of a factor that is given, the original context is the one that `origin` was trained for."""
    prefix = "model.rope_scaling."
    own = {key.removeprefix(prefix): None for key in given if key.startswith(prefix)}
    values = {name: getattr(scaling, name) for name in own}
    if "factor" in own and "original_max_position_embeddings" not in own and origin.rope_scaling.factor == 1:
        values["original_max_position_embeddings"] = origin.max_position_embeddings
    return replace(origin.rope_scaling, **values)


def _check_tokenizer(config: Config, origin: TokenizerConfig, given: Collection[str]) -> None:
    """Raises ConfigError for a tokenizer that would be trained, or another end token. Files are compared later."""
    if any(data.prepared for data in config.data.sources):
        return
    for name in OF_A_TOKENIZER:
        own, there = getattr(config.tokenizer, name), getattr(origin, name)
        is_file = config.tokenizer.name != "train" and name != "eos_token"
        if f"tokenizer.{name}" in given and own != there and not is_file:
            raise ConfigError(
                f"tokenizer.{name} = {shown(own)}: the tokenizer of train.init_from = {config.train.init_from} comes "
                f"along with its weights, there it is {shown(there)}: leave it out"
            )
