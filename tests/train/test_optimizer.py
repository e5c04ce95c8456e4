import torch

from p828.config import OptimizerConfig
from p828.model.initialisation import initialise
from p828.model.transformer import Transformer
from p828.train.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from tiny import tiny_config


def build(**options: bool) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(tiny_config(use_qk_norm=True))
    initialise(model, 0)
    return model, build_optimizer(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.5, **options))


def decayed_names(model: Transformer, optimizer: torch.optim.AdamW) -> set[str]:
    """What a step without gradients shrinks: decay is all that it does then."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0  # sinks and norms at zero would show nothing
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name] + 1.0)}


def test_matrices_decay_and_norms_sinks_and_embedding_do_not() -> None:
    decayed = decayed_names(*build())
    plain = {name for name, _ in build()[0].named_parameters()} - decayed
    assert {name.split(".")[-2] for name in decayed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate", "experts", "gate_proj", "up_proj", "down_proj", "lm_head"
    }  # fmt: skip
    assert all(name.endswith(("norm.weight", "sinks")) or "embed" in name for name in plain)


def test_the_embedding_decays_when_asked_for() -> None:
    assert "model.embed_tokens.weight" in decayed_names(*build(decay_embeddings=True))


def test_saved_state_continues_bit_for_bit() -> None:
    model, optimizer = build()
    twin, twin_optimizer = build()

    def step(model: Transformer, optimizer: torch.optim.AdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    step(model, optimizer, 1)
    twin.load_state_dict(model.state_dict())
    load_optimizer_tensors(twin, twin_optimizer, optimizer_tensors(model, optimizer))
    step(model, optimizer, 2)
    step(twin, twin_optimizer, 2)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
