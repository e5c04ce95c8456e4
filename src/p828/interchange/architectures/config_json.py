"""Hugging Face's config.json, field by field: types are checked, and what p828 does not have is named in a line."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from p828.config import ModelConfig, RopeScaling, facts_by_key
from p828.config.rules import check_model, check_range
from p828.config.values import flatten, shown
from p828.errors import ConfigError, did_you_mean

T = TypeVar("T")
REQUIRED = object()
WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a table", list: "a list",
}  # fmt: skip
ROPE_TYPES = ("default", "yarn")
ATTENTION_FACTOR_TOLERANCE = 1e-6  # of a number that is written down in decimals


class Need(NamedTuple):
    """A field of theirs that p828 has one value of."""

    name: str
    accepted: Any
    default: Any
    """What transformers takes where the field is missing."""
    words: str
    """What p828 does not have, in any other case."""


# Of every architecture here.
COMMON = (
    Need("hidden_act", "silu", "silu", "activations other than silu"),
    Need("attention_bias", False, False, "a bias in attention"),
    Need("attention_dropout", 0.0, 0.0, "dropout in attention"),
)


@dataclass(frozen=True)
class Fields:
    """The values of a config.json. `read` and `check` raise ConfigError naming the field."""

    values: Mapping[str, Any]

    def read(self, name: str, kind: type[T], default: Any = REQUIRED) -> T:
        """A field's value. null is as good as none. A whole number is a number, too."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is REQUIRED:
            raise ConfigError(f"{name} is missing{did_you_mean(name, self.values)}")
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{name} = {shown(value)}: {WORDS[kind]} is accepted")
        return value

    def check(self, needs: Iterable[Need]) -> None:
        for need in needs:
            value = self.values.get(need.name)
            value = need.default if value is None else value
            if value != need.accepted:
                raise ConfigError(
                    f"{need.name} = {shown(value)}: p828 does not have {need.words}; {shown(need.accepted)} is accepted"
                )


def read_common(fields: Fields, rope: Mapping[str, Any], head_dim: int | None = None) -> dict[str, Any]:
    """The settings that every architecture has under one name.

    `rope` is what `rope_table` gives, `head_dim` transformers' default where it is no share of the hidden size.
    """
    fields.check(COMMON)
    heads, hidden = fields.read("num_attention_heads", int), fields.read("hidden_size", int)
    context = fields.read("max_position_embeddings", int)
    theta, scaling = read_rope(rope, context)
    return {
        "vocab_size": fields.read("vocab_size", int),
        "hidden_size": hidden,
        "num_hidden_layers": fields.read("num_hidden_layers", int),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.read("num_key_value_heads", int, heads),
        "head_dim": fields.read("head_dim", int, head_dim or hidden // max(heads, 1)),
        "max_position_embeddings": context,
        "rms_norm_eps": fields.read("rms_norm_eps", float),
        "tie_word_embeddings": fields.read("tie_word_embeddings", bool, False),
        "initializer_range": fields.read("initializer_range", float, ModelConfig().initializer_range),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def read_router(fields: Fields) -> dict[str, Any]:
    """The settings of a router of DeepSeek-V3's kind, with a sigmoid, a balance bias and groups."""
    return {
        "n_routed_experts": fields.read("n_routed_experts", int),
        "num_experts_per_tok": fields.read("num_experts_per_tok", int),
        "n_group": fields.read("n_group", int, 1),
        "topk_group": fields.read("topk_group", int, 1),
        "norm_topk_prob": fields.read("norm_topk_prob", bool, True),
        "routed_scaling_factor": fields.read("routed_scaling_factor", float, 1.0),
    }


def rope_table(fields: Fields, theta: float, partial_rotary_factor: float = 1.0) -> dict[str, Any]:
    """`rope_parameters`, or the fields that stood for it before transformers 5; the arguments are its defaults."""
    old = {
        "rope_theta": fields.read("rope_theta", float, theta),
        "partial_rotary_factor": fields.read("partial_rotary_factor", float, partial_rotary_factor),
    }
    given: dict[str, Any] = fields.read("rope_parameters", dict, fields.read("rope_scaling", dict, {}))
    return {**old, **given}


def read_rope(rope: Mapping[str, Any], context: int) -> tuple[float, RopeScaling]:
    """RoPE's base and its scaling. Raises ConfigError for what is not plain RoPE or YaRN with its own factor."""
    fields = Fields(rope)
    kind = fields.read("rope_type", str, fields.read("type", str, "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope_type = {shown(kind)}: p828 has {' and '.join(map(shown, ROPE_TYPES))}")
    fields.check([Need("partial_rotary_factor", 1.0, 1.0, "RoPE on a part of each head")])
    theta = fields.read("rope_theta", float)
    if kind == "default":
        return theta, RopeScaling()
    fields.check(
        [
            Need("truncate", True, True, "YaRN without rounding its range"),
            Need("mscale", None, None, "YaRN with an mscale"),
            Need("mscale_all_dim", None, None, "YaRN with an mscale"),
        ]
    )
    scaling = RopeScaling(
        fields.read("factor", float),
        fields.read("original_max_position_embeddings", int, context),
        fields.read("beta_fast", float, 32.0),
        fields.read("beta_slow", float, 1.0),
    )
    own = 0.1 * math.log(max(scaling.factor, 1.0)) + 1  # as in `model.rope`
    given = fields.read("attention_factor", float, own)
    if not math.isclose(given, own, rel_tol=ATTENTION_FACTOR_TOLERANCE):
        raise ConfigError(f"attention_factor = {given}: 0.1 ln(factor) + 1 is accepted, which is {own:.6f}")
    return theta, scaling


def checked(model: ModelConfig) -> ModelConfig:
    """The same. Raises ConfigError for what no configuration of p828 may have, as `config.rules.validate` does."""
    facts = facts_by_key(ModelConfig)
    for key, value in flatten(model).items():
        check_range(f"model.{key}", value, facts[key])
    check_model(model)
    return model
