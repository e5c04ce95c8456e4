"""Runs in which nothing is broken, as different as users' are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import Healthy, Settings, Strength
from corpus import files
from injections.machine import compiled_quickly
from injections.patching import replaced

import p828.data.loader
from p828.data.batch import Batch

BAD_BATCHES = range(361, 365)  # micro-batches of steps 181 and 182


@contextmanager
def two_bad_steps(strength: Strength) -> Iterator[None]:
    """Two steps of random tokens, in the middle of sound data; made once, so that a rollback skips them."""
    made = 0

    def make(original: Any) -> Any:
        def make_batch(*arguments: Any) -> Batch:
            nonlocal made
            made += 1
            batch: Batch = original(*arguments)
            if made not in BAD_BATCHES:
                return batch
            tokens_BS = torch.randint(0, 512, batch.tokens_BS.shape)
            return replace(batch, tokens_BS=tokens_BS, targets_BS=tokens_BS.roll(-1, dims=1))

        return make_batch

    with replaced(p828.data.loader, "make_batch", make):
        yield


def _changes(**sections: dict[str, Any]) -> Any:
    return lambda corpus: sections


def _talk(corpus: Path) -> Settings:
    return {
        "data": {**files(corpus, "talk"), "messages_field": "messages"},
        "evaluation": {"prompts": ["What is get?"]},
    }


def _mixture(corpus: Path) -> Settings:
    code, prose = (files(corpus, name) for name in ("code", "prose"))
    for source in (code, prose):
        del source["sequence_length"]
    sources = [{"name": "code", **code, "weights": [2.0, 1.0]}, {"name": "prose", **prose, "weights": [1.0, 1.0]}]
    return {"data": {"mixture": sources, "mixture_steps": [0, 120]}}


def _prepared(corpus: Path) -> Settings:
    return {"data": {"prepared": str(corpus / "prepared"), "validation": {"fraction": 0.01}}}


def _several_epochs(corpus: Path) -> Settings:
    return {"data": files(corpus, "few")}


HEALTHY = (
    Healthy("as the faults are"),
    Healthy("another seed", seed=7),
    Healthy(
        "wider and deeper",
        _changes(model={"hidden_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 24}),
    ),
    Healthy(
        "one layer, one expert a token",
        _changes(model={"num_hidden_layers": 1, "num_experts_per_tok": 1, "norm_topk_prob": False}),
    ),
    Healthy("constant rate", _changes(schedule={"kind": "constant", "warmup_steps": 20})),
    Healthy("WSD", _changes(schedule={"kind": "wsd", "warmup_steps": 20, "decay_steps": 60, "min_lr_ratio": 0.0})),
    Healthy(
        "low rate, other betas",
        _changes(optimizer={"learning_rate": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.01}),
    ),
    Healthy("high rate, no decay", _changes(optimizer={"learning_rate": 6e-3, "weight_decay": 0.0})),
    Healthy("prepared tokens", _prepared),
    Healthy("a mixture whose weights change", _mixture),
    Healthy("conversations", _talk),
    Healthy("several epochs", _several_epochs),
    Healthy(
        "32 experts, 4 a token, no shared one",
        _changes(model={"n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 0,
                        "moe_intermediate_size": 24}),
    ),
    Healthy(
        "groups, two shared experts",
        _changes(model={"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}),
    ),
    Healthy(
        "softmax, auxiliary loss and z-loss",
        _changes(model={"scoring_func": "softmax"},
                 balance={"update_rate": 0.0, "sequence_loss_weight": 0.01, "z_loss_weight": 1e-3}),
    ),
    Healthy(
        "no sinks, norms of queries and keys, a tied head",
        _changes(model={"attention_sinks": False, "use_qk_norm": True, "tie_word_embeddings": True}),
    ),
    Healthy("recomputed, accumulated", _changes(train={"gradient_checkpointing": True, "micro_batch_size": 1,
                                                       "gradient_accumulation": 8}, model={"dropout": 0.1})),
    Healthy("bfloat16, documents not masked", _changes(train={"dtype": "bfloat16"}, model={"mask_documents": False})),
    Healthy("compiled", _changes(train={"compile": "on"}), inject=compiled_quickly),
    Healthy("two ranks", _changes(train={"gradient_accumulation": 1}), ranks=2),
    Healthy("ended by a signal and resumed", is_resumed=True),
    Healthy("rolled back", _changes(rollback={"after_steps": 2, "spike_threshold": 1.0}), inject=two_bad_steps),
)  # fmt: skip
