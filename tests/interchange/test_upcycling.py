"""Experts made of a dense model begin as the same function."""

import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import p828
from exported import difference, letters, logits
from p828.config import Config, ModelConfig
from p828.errors import ConfigError
from p828.interchange.upcycling import UpcycledWeights
from p828.model.transformer import Transformer
from p828.runs.weights import Weights
from runs import run_config
from tiny import tiny_config, tiny_model

# The K chosen experts' weights sum to 1 within some units of 2^-24, and so does each of a few layers' sums.
TOLERANCE = 3e-6
DENSE: dict[str, Any] = {
    "n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 0, "moe_intermediate_size": 24,
}  # fmt: skip


class InMemory(Weights):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.shapes = tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def shard(self, name: str, start: int, count: int) -> Tensor:
        return self.tensors[name].flatten()[start : start + count]


def upcycled(dense: Transformer, config: ModelConfig) -> tuple[Transformer, UpcycledWeights]:
    weights = UpcycledWeights(InMemory(dict(dense.state_dict())), dense.config, config, seed=3)
    model = Transformer(config)
    model.load_state_dict(dict(weights))
    return model.eval(), weights


TARGETS: dict[str, dict[str, Any]] = {
    "copies": {"n_routed_experts": 6, "num_experts_per_tok": 2},
    "copies, softmax, shared, scaled": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "scoring_func": "softmax", "n_shared_experts": 2,
        "routed_scaling_factor": 2.5,
    },
    "copies, groups": {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "one of each": {"n_routed_experts": 4, "num_experts_per_tok": 1},
    "slices": {"n_routed_experts": 12, "num_experts_per_tok": 6, "moe_intermediate_size": 8},
    "slices, softmax, shared, scaled": {
        "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 6, "scoring_func": "softmax",
        "n_shared_experts": 1, "routed_scaling_factor": 1.7,
    },
    "slices, groups": {
        "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 12, "n_group": 4, "topk_group": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("act, target", list(product(["swiglu", "swiglu_of_product"], TARGETS)))
@torch.no_grad()
def test_the_same_function(act: str, target: str) -> None:
    same = {"hidden_act": act, "attention_sinks": act == "swiglu"}
    dense = tiny_model(**DENSE, **same)
    model, _ = upcycled(dense, tiny_config(**{**DENSE, **same, **TARGETS[target]}))
    tokens = torch.randint(97, (3, 40))
    expected = logits(dense, tokens)
    assert expected.std() > 0.1
    assert difference(logits(model, tokens), expected) < TOLERANCE


def test_the_slices_of_a_copy_are_chosen_together() -> None:
    dense = tiny_model(**DENSE)
    model, _ = upcycled(dense, tiny_config(**{**DENSE, **TARGETS["slices"]}))
    routing = model.layers[0].mlp.gate(torch.randn(50, 32))
    copies_TK = (routing.experts_TK // 3).sort(dim=1).values
    assert torch.equal(copies_TK[:, 0], copies_TK[:, 2])
    assert torch.equal(copies_TK[:, 3], copies_TK[:, 5])
    assert len(copies_TK.unique()) == 4
    assert torch.allclose(routing.weights_TK.sum(dim=1), torch.ones(50))


@pytest.mark.parametrize("target", ["copies, softmax, shared, scaled", "slices"])
def test_a_rank_reads_its_share(target: str) -> None:
    """Any stretch of the flattened tensor, across experts."""
    _, weights = upcycled(tiny_model(**DENSE), tiny_config(**{**DENSE, **TARGETS[target]}))
    for name, tensor in weights.items():
        whole = tensor.flatten()
        cuts = [0, len(whole) // 7, len(whole) // 2 + 1, len(whole)]
        parts = [weights.shard(name, start, end - start) for start, end in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a dense run, runs/dense, and a dense model of transformers, `theirs`."""
    home = tmp_path_factory.mktemp("upcycling")
    config = run_config(home, model={**DENSE, "moe_intermediate_size": 32})
    p828.train_run(Config(**{**vars(config), "name": "dense"}))
    values = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 48, "eos_token_id": 89,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).save_pretrained(home / "theirs")
    letters().save(home / "theirs/tokenizer.json")
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def configured(source: str, name: str, model: dict[str, Any], **train: Any) -> Config:
    overrides = {
        "name": name, "train": {"init_from": source, "upcycle": True, "steps": 2, "micro_batch_size": 2, **train},
        "schedule.warmup_steps": 1, "evaluation.every": 0, "evaluation.prompts": [],
        "model": {"n_routed_experts": 8, "num_experts_per_tok": 2, **model},
    }  # fmt: skip
    return p828.load_config("runs/dense", overrides)


@pytest.mark.parametrize(
    "source, model",
    [
        ("runs/dense", {}),
        ("runs/dense", {"moe_intermediate_size": 16, "n_shared_experts": 1, "num_experts_per_tok": 4}),
        ("theirs", {"moe_intermediate_size": 24, "routed_scaling_factor": 2.0}),
    ],
    ids=["copies", "slices", "llama"],
)
def test_the_first_loss_is_the_dense_models(source: str, model: dict[str, Any], here: Path) -> None:
    config = configured(source, f"moe_{source[-6:]}_{len(model)}".replace("/", "_"), model)
    run = p828.train_run(config)
    assert run.config.model.n_routed_experts == 8
    first = next(record for record in run.records if record["kind"] == "step")
    dense = {"name": "as_it_is", "train.init_from": source, "train.steps": 2, "schedule.warmup_steps": 1}
    expected = p828.train_run(
        p828.load_config("runs/dense", {**dense, "name": f"{run.path.name}_dense", "train.micro_batch_size": 2})
    )
    assert first["loss"] == pytest.approx(next(r for r in expected.records if r["kind"] == "step")["loss"], rel=1e-6)
    assert "upcycled to 8 experts" in re.sub(r"\n\S+ \S+ +", " ", (run.path / "log.txt").read_text())
    assert [r["upcycled"] for r in run.records if r.get("event") == "init_from"] == [True]
    assert p828.train_run(configured(source, run.path.name, model, steps=3)).step == 3


@pytest.mark.parametrize(
    "model, train, message",
    [
        (
            {},
            {"upcycle": False},
            "n_routed_experts = 8 and there 1; a dense model becomes experts with",
        ),
        ({"norm_topk_prob": False}, {}, "model.norm_topk_prob = false: with train.upcycle = true, true is accepted"),
        (
            {"n_routed_experts": 1, "num_experts_per_tok": 1},
            {},
            "n_routed_experts = 1: with train.upcycle = true",
        ),
        (
            {"moe_intermediate_size": 20},
            {},
            "moe_intermediate_size = 20: with train.upcycle",
        ),
        (
            {"moe_intermediate_size": 16, "num_experts_per_tok": 3},
            {},
            "with train.upcycle = true and model.moe_intermediate_size = 16, a multiple of 2 is accepted",
        ),
        (
            {"moe_intermediate_size": 16, "n_routed_experts": 7},
            {},
            "n_routed_experts = 7: with train.upcycle",
        ),
        ({"attention_sinks": False}, {}, "another model: model.attention_sinks = false and there true"),
    ],
)
def test_what_cannot_begin_as_the_same_function(
    model: dict[str, Any], train: dict[str, Any], message: str, here: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        configured("runs/dense", "none", model, **train)
    assert "\n" not in str(caught.value)
