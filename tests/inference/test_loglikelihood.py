"""Log-likelihoods of continuations, beside the log-softmax of each by itself in float64."""

import pytest
import torch

from oracles import assert_near
from p828.inference.loglikelihood import Request, loglikelihoods
from p828.model.transformer import Transformer
from tiny import tiny_model

CONTEXT = 64
# Float32 through two layers and the head is within 2e-5 of the largest logit (tests/model/test_parity.py), which is
# below 100 here, and so is the log-likelihood of a token.
PER_TOKEN = 2e-3


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


def draw(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def naive(model: Transformer, request: Request) -> tuple[float, bool]:
    """Token by token, each from the last tokens before it that the model's context holds."""
    twin = tiny_model().double()
    twin.frequencies = model.frequencies.double()
    nats, is_greedy, tokens = 0.0, True, [*request.context, *request.continuation]
    for end in range(len(request.context), len(tokens)):
        # pieces of a long continuation begin where the ones before them end
        piece_end = min(len(request.context) + CONTEXT * ((end - len(request.context)) // CONTEXT + 1), len(tokens))
        inputs = tokens[max(piece_end - 1 - CONTEXT, 0) : end]
        hidden_BSH = twin(torch.tensor([inputs]), dtype=torch.float64).hidden_BSH
        logits_V = hidden_BSH[0, -1] @ twin.head_weight.T
        nats += logits_V.log_softmax(0)[tokens[end]].item()
        is_greedy = is_greedy and int(logits_V.argmax()) == tokens[end]
    return nats, is_greedy


@pytest.mark.parametrize(
    "context, continuation", [(1, 1), (5, 3), (1, 30), (63, 1), (64, 1), (60, 20), (200, 4), (1, 64), (3, 150)]
)
def test_each_token_is_predicted_from_those_before_it(model: Transformer, context: int, continuation: int) -> None:
    request = Request(*draw(context, continuation))
    ((nats, is_greedy),) = loglikelihoods(model, [request], torch.float32, batch_tokens=1)
    expected, expected_greedy = naive(model, request)
    assert nats == pytest.approx(expected, abs=PER_TOKEN * continuation)
    assert is_greedy == expected_greedy


def test_batches_change_no_score(model: Transformer) -> None:
    requests = [Request(*draw(1 + 7 * i % 50, 1 + 11 * i % 90)) for i in range(24)]
    done: list[int] = []
    alone = [loglikelihoods(model, [request], torch.float32, 1)[0] for request in requests]
    together = loglikelihoods(model, requests, torch.float32, 300, done.append)
    assert_near(torch.tensor([score.nats for score in together]), torch.tensor([score.nats for score in alone]), 1e-5)
    assert [score.is_greedy for score in together] == [score.is_greedy for score in alone]
    assert done == sorted(done)
    assert 1 < len(done) < len(requests)


def test_the_likeliest_tokens_are_greedy(model: Transformer) -> None:
    (context,) = draw(6)
    with torch.no_grad():
        best = int(model.logits(model(torch.tensor([context])).hidden_BSH[0, -1]).argmax())
    found = loglikelihoods(
        model, [Request(context, [best]), Request(context, [(best + 1) % 97]), Request(context, [])], torch.float32, 99
    )
    assert [score.is_greedy for score in found] == [True, False, True]
    assert found[2].nats == 0
    assert model.training is False


def test_answers_that_differ_in_their_last_token_are_one_row(model: Transformer) -> None:
    context, other = draw(6, 7)
    requests = [Request(context, [9, answer]) for answer in (1, 2, 3)] + [Request(other, [4])] + [Request(context, [9])]
    done: list[int] = []
    found = loglikelihoods(model, requests, torch.float32, 1, done.append)
    assert len(done) == 3, "rows: two of seven tokens, one of six"
    for request, score in zip(requests, found, strict=True):
        assert score.nats == pytest.approx(naive(model, request)[0], abs=2 * PER_TOKEN)
