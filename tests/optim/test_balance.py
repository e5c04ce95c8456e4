import torch

from p828.model.transformer import Transformer
from p828.optim.balance import update_biases
from tiny import tiny_config

YES, NO = torch.tensor(True), torch.tensor(False)


def test_bias_rises_under_the_mean_load_falls_above_and_stays_centred() -> None:
    model = Transformer(tiny_config(num_hidden_layers=2, n_routed_experts=4))
    loads_LE = torch.tensor([[10, 2, 6, 6], [0, 0, 0, 24]])
    update_biases(model, loads_LE, rate=0.01, applied=YES)
    first, second = (layer.mlp.gate.e_score_correction_bias for layer in model.model.layers)
    # signs (-1, 1, 0, 0) have mean 0; signs (1, 1, 1, -1) have mean 1/2, which is taken off
    torch.testing.assert_close(first, torch.tensor([-0.01, 0.01, 0.0, 0.0]))
    torch.testing.assert_close(second, torch.tensor([0.005, 0.005, 0.005, -0.015]))
    assert first.dtype == torch.float32


def test_a_step_that_is_not_applied_moves_no_bias() -> None:
    model = Transformer(tiny_config(num_hidden_layers=1, n_routed_experts=4))
    bias = model.model.layers[0].mlp.gate.e_score_correction_bias
    bias.normal_()
    before = bias.clone()
    update_biases(model, torch.tensor([[10, 2, 6, 6]]), rate=0.01, applied=NO)
    assert torch.equal(bias, before)


def test_repeated_updates_even_out_a_one_sided_router() -> None:
    config = tiny_config(num_hidden_layers=1, n_routed_experts=4, num_experts_per_tok=1)
    model = Transformer(config)
    gate = model.model.layers[0].mlp.gate
    x_TH = torch.randn(400, config.hidden_size)
    with torch.no_grad():
        gate.weight.normal_(0, 0.1)
        gate.weight[2] *= 20  # its scores reach further up, so it wins about half of the tokens

    def loads() -> torch.Tensor:
        return torch.bincount(gate(x_TH).experts_TK.flatten(), minlength=4)

    before = loads()
    for _ in range(300):
        update_biases(model, loads()[None], rate=0.005, applied=YES)
    assert before.max() > 1.7 * 100
    assert loads().max() < 1.2 * 100
    assert loads().min() > 0.8 * 100
