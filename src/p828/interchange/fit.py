"""Whether the weights of one model are those of another, or become them (`upcycling`). No torch."""

from p828.config import Config, ModelConfig
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
            f"{origin.n_routed_experts}, n_shared_experts = {origin.n_shared_experts}, norm_topk_prob = "
            f"{shown(origin.norm_topk_prob)}, routed_scaling_factor = {origin.routed_scaling_factor:g}): leave it out"
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
