import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from taught_text import TAUGHT

from p828.config import Config, DataConfig, ValidationConfig
from p828.data.batch import Batch
from p828.data.build import validation_batches
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import DataError
from p828.inference.evaluate import Evaluation, evaluate
from p828.model.transformer import Transformer
from tiny import tiny_model

LENGTH = 24


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """8 rows and a padded ninth of documents of unequal length."""
    draw = random.Random(0)
    for index in range(14):
        (tmp_path / f"{index}.txt").write_text("".join(draw.choices("the cat", k=draw.randint(1, 40))))
    validation = ValidationConfig(kind="files", files=(f"{tmp_path}/*.txt",))
    return Config(data=DataConfig(sequence_length=LENGTH, validation=validation))


def batches_of(config: Config, tokenizer: Tokenizer, micro_batch_size: int, rows: int = 100) -> list[Batch]:
    return validation_batches(config.data, tokenizer, config.model.mask_documents, rows, micro_batch_size)


@pytest.mark.parametrize("mask_documents", [True, False])
def test_the_same_for_every_batch_size(letters: Tokenizer, config: Config, mask_documents: bool) -> None:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mask_documents=mask_documents))
    model = tiny_model(mask_documents=mask_documents)
    results = [evaluate(model, batches_of(config, letters, size)) for size in (1, 2, 3, 8, 100)]
    assert len(batches_of(config, letters, 1)) > 8
    for result in results[1:]:
        assert (result.tokens, result.bytes) == (results[0].tokens, results[0].bytes)
        # Matrix products of other sizes add in another order: 2^-24 an operation, averaged over 200 tokens.
        assert result.loss == pytest.approx(results[0].loss, rel=1e-7)
        assert result.bits_per_byte == pytest.approx(results[0].bits_per_byte, rel=1e-7)


def test_against_float64(letters: Tokenizer, config: Config) -> None:
    """One row at a time in float64 (RoPE and the weights excepted, which are float32)."""
    model = tiny_model()
    batches = batches_of(config, letters, 4)
    result = evaluate(model, batches)

    losses, targets = [], []
    double = tiny_model().double()
    for batch in batches_of(config, letters, 1):
        hidden_BSH = double(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=torch.float64).hidden_BSH
        logits_SV = hidden_BSH[0] @ double.head_weight.T
        losses.append(F.cross_entropy(logits_SV, batch.targets_BS[0], ignore_index=-100, reduction="sum").item())
        targets.extend(t for t in batch.targets_BS[0].tolist() if t != -100)
    bits = sum(losses) / math.log(2)
    assert result.tokens == len(targets)
    # All tokens of this tokenizer are one byte; a document's end is none.
    assert result.bytes == sum(t != letters.eos_id for t in targets)
    # Per token the two layers leave about 1e-6, which averages out over the tokens.
    assert result.loss == pytest.approx(sum(losses) / len(targets), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(targets)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(bits / result.bytes, rel=1e-6)


def uniform(model: Transformer) -> Transformer:
    """All logits zero."""
    with torch.no_grad():
        model.head_weight.zero_()
    return model


def test_bits_per_byte_of_a_uniform_model(byte_level: Tokenizer) -> None:
    """Every token costs ln V nats, so n tokens that spell b bytes cost n log2 V / b bits a byte."""
    ids = byte_level.encode(TAUGHT)
    rows = torch.tensor([[byte_level.eos_id, *ids, byte_level.eos_id]])
    tokens_BS, targets_BS = rows[:, :-1], rows[:, 1:]
    positions_BS, documents_BS = torch.arange(len(ids) + 1)[None], torch.zeros_like(tokens_BS)
    size = len(TAUGHT.encode())
    batch = Batch(tokens_BS, targets_BS, positions_BS, documents_BS, num_targets=len(ids) + 1, text_bytes=size)
    result = evaluate(uniform(tiny_model(vocab_size=288)), [batch])
    # ln 288 in float32.
    assert result.loss == pytest.approx(math.log(288), rel=1e-6)
    assert result.perplexity == pytest.approx(288, rel=1e-5)
    assert result.tokens == len(ids) + 1
    assert result.bytes == size
    assert result.bits_per_byte == pytest.approx((len(ids) + 1) * math.log2(288) / size, rel=1e-6)


def test_a_huge_loss_has_an_infinite_perplexity(letters: Tokenizer, config: Config) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight.mul_(1e5)
    result = evaluate(model, batches_of(config, letters, 4))
    assert 1000 < result.loss < math.inf
    assert result.perplexity == math.inf


def test_what_is_not_finite_stays_so(letters: Tokenizer, config: Config) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight.fill_(math.nan)
    result = evaluate(model, batches_of(config, letters, 4))
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.bits_per_byte)


def test_nothing_global_changes(letters: Tokenizer, config: Config) -> None:
    model = tiny_model(dropout=0.5).train()
    batches = batches_of(config, letters, 4)
    before = torch.get_rng_state()
    first = evaluate(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert torch.is_grad_enabled()
    assert evaluate(model.eval(), batches) == first
    assert not model.training


def test_nothing_to_evaluate(letters: Tokenizer) -> None:
    with pytest.raises(DataError, match="no target"):
        evaluate(tiny_model(), [])


def test_tokens_without_text(letters: Tokenizer, config: Config) -> None:
    """Bits per byte have no meaning without a byte, but are no error."""
    batches = [dataclasses.replace(batch, text_bytes=0) for batch in batches_of(config, letters, 4)]
    result = evaluate(tiny_model(), batches)
    assert isinstance(result, Evaluation)
    assert result.bits_per_byte == math.inf
