"""`p828 bench generate`: what a step must read, the figures of a row, and the systems that are timed."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch

from p828.bench.generation.own import OwnGenerator
from p828.bench.generation.rows import FirstTokenRow, RecomputeRow, StepRow, best_peer, make_row
from p828.bench.generation.step_bytes import expected_experts, step_bytes
from p828.bench.generation.table import WIDTH, header, show_failure, show_row
from p828.bench.generation.workload import Item, Workload, random_prompts, slot_length
from p828.bench.systems import System
from p828.config import Config, DataConfig, TrainConfig
from p828.model.costs import count_parameters
from tiny import tiny_config, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers.llama_cpp_generate import LlamaCppGenerator
from peers.transformers_generate import TransformersGenerator

WORK = Workload(batches=(1, 3), prompt_length=9, new_tokens=5)


def tiny_run(**model: object) -> Config:
    return Config(
        name="tiny",
        model=tiny_config(**{"max_position_embeddings": 160, **model}),
        data=DataConfig(sequence_length=16),
        train=TrainConfig(device="cpu"),
    )


def test_expected_experts() -> None:
    """Every way in which three tokens choose two of four experts, each as likely."""
    pairs = list(itertools.combinations(range(4), 2))
    ways = [len({*a, *b, *c}) for a, b, c in itertools.product(pairs, repeat=3)]
    model = tiny_config(n_routed_experts=4, num_experts_per_tok=2)
    assert expected_experts(model, 3) == pytest.approx(sum(ways) / len(ways))
    assert expected_experts(model, 1) == 2
    assert expected_experts(model, 1000) == pytest.approx(4)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step(tied: bool) -> None:
    """Of a batch that goes through all experts: all parameters but the embedding's unused rows, and the cache."""
    model = tiny_model(tie_word_embeddings=tied, use_qk_norm=True)
    in_float32 = ("norm", "gate.weight", "sinks")
    batch = 4000
    expected = batch * 32 * 2  # a row of the embedding for each sequence
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name or tied:
            is_float32 = "experts" not in name and any(word in name for word in in_float32)
            expected += parameter.numel() * (4 if is_float32 else 2)
    expected += batch * 10 * 2 * (2 * 2 * 8) * 2  # tokens, layers, keys and values of two heads of 8
    assert step_bytes(model.config, batch, 10, itemsize=2) == pytest.approx(expected, rel=1e-6)
    one_expert = 3 * 24 * 32 * 2
    less = step_bytes(model.config, 1, 0, 2) - step_bytes(
        dataclasses.replace(model.config, num_experts_per_tok=1), 1, 0, 2
    )
    assert less == pytest.approx(2 * 2 * one_expert)  # two experts less in each of two layers


MEASURED = {
    "item": {"batch": 4}, "seconds": 0.002, "seconds_range": (0.0019, 0.004), "cached_tokens": 10.0,
    "sampled_seconds": 0.004, "distinct_experts": 4.0, "peak_memory_bytes": 5,
}  # fmt: skip


def test_figures() -> None:
    config = tiny_config()
    row = make_row("s", "p828", "p828", config, "float32", MEASURED, rate=1e9)
    assert isinstance(row, StepRow)
    assert (row.batch, row.ms, row.tokens_per_second, row.sampled_tokens_per_second) == (4, 2.0, 2000, 1000)
    assert row.step_bytes == step_bytes(config, 4, 10, 4)
    assert row.memory_share == pytest.approx(row.step_bytes / 0.002 / 1e9)
    first = make_row("s", "p828", "p828", config, "float32", {"item": {"first_token": 512}, "seconds": 0.5}, 1e9)
    assert first == FirstTokenRow("s", "p828", "p828", 512, 500)
    times = {"item": {"recompute": 1024}, "step_seconds": 0.5, "forward_seconds": 2}
    assert make_row("s", "x", "p828", config, "float32", times, 1e9) == RecomputeRow("s", "x", "p828", 1024, 500, 2000)


def test_the_fastest_peer_of_the_same_kind() -> None:
    def row(system: str, seconds: float, **item: int) -> StepRow | FirstTokenRow | RecomputeRow:
        return make_row(
            "s", system, system, tiny_config(), "float32", {**MEASURED, "item": item, "seconds": seconds}, 1e9
        )

    peers = [row("a", 3, batch=4), row("b", 2, batch=4), row("b", 1, batch=1), row("b", 5, first_token=4)]
    assert best_peer(peers, row("p828", 1, batch=4)) == 2
    assert best_peer(peers, row("p828", 1, first_token=4)) == 5
    assert best_peer(peers, row("p828", 1, batch=16)) is None
    assert best_peer(peers, dataclasses.replace(row("p828", 1, batch=4), shape="other")) is None


def test_text_fits_eighty_columns() -> None:
    slow = {**MEASURED, "seconds": 12.3456, "seconds_range": (10.0, 99.0), "item": {"batch": 4096}}
    rows = [make_row("s", "p828", "p828", tiny_config(), "float32", one, 1e3) for one in (MEASURED, slow)]
    rows.append(FirstTokenRow("s", "p828", "p828", 131072, 123456.7))
    rows.append(RecomputeRow("s", "p828", "p828", 1024, 1234.5, 123456.7))
    texts = [header(), show_failure("x", "word " * 50 + "\n" + "y" * 300), *(show_row(row, 1234.5) for row in rows)]
    assert all(len(line) <= WIDTH for text in texts for line in text.splitlines()), "\n".join(texts)
    assert "noisy: the runs took 1.900 to 4.000 ms" in texts[2]
    assert "4.0 experts a layer were read, 6.8 are counted" in texts[2]


def test_items_and_room() -> None:
    work = Workload((1, 64), 3000, 10)
    assert [str(item) for item in work.items(recomputes=True)] == [
        "batch 1", "batch 64", "first token after 512", "first token after 2,048", "context 1,024",
    ]  # fmt: skip
    assert all(Item(**item.to_dict()) == item for item in work.items(recomputes=False))
    # While 64 prompts are read in two pieces each, the first sequence takes 127 steps.
    assert slot_length(3000, 64, 10) >= 3000 + 127 + 10
    assert work.with_context(tiny_run()).model.max_position_embeddings > slot_length(3000, 64, 10)
    assert random_prompts(97, 2, 5) == random_prompts(97, 2, 5) != random_prompts(97, 2, 5, seed=1)


def test_own_steps() -> None:
    generator = OwnGenerator(tiny_run())
    assert generator.dtype == "float32"
    for is_sampled in (False, True):
        for count in (1, 3):
            timed = generator.steps(random_prompts(97, count, 9), 5, is_sampled)
            assert timed.seconds > 0
            # 9 of the prompt, the first token and the warm steps; the first of three has taken two steps more.
            assert 9 + 5 + 2 <= timed.cached_tokens <= 9 + 5 + 2 + 3 + 2
    assert generator.first_token(list(range(20))) > 0
    assert generator.recomputed(32) > 0
    assert generator.distinct_experts(random_prompts(97, 1, 9), 4) == 3, "three experts a token"
    assert 3 < generator.distinct_experts(random_prompts(97, 6, 9), 4) <= 8


def test_transformers_generates() -> None:
    config = tiny_run(attention_sinks=False)
    generator = TransformersGenerator(System("peer", "transformers", config))
    assert sum(p.numel() for p in generator.model.parameters()) == count_parameters(config.model).total
    timed = generator.steps(random_prompts(97, 3, 9), 5, is_sampled=False)
    assert timed.seconds > 0
    assert timed.cached_tokens == pytest.approx(9 + 4 + 3)
    assert generator.first_token(list(range(20))) > 0


def test_llama_cpp_generates() -> None:
    config = tiny_run(attention_sinks=False, vocab_size=288, head_dim=32)
    generator = LlamaCppGenerator(System("peer", "xllamacpp", config))
    timed = generator.steps(random_prompts(288, 2, 9), 5, is_sampled=False)
    assert timed.seconds > 0
    assert generator.first_token(list(range(20))) > 0


def test_weights_are_not_trained_ones() -> None:
    """The same seed, the same weights, in the dtype that the device takes."""
    first, second = (OwnGenerator(tiny_run()).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
