import string
from typing import Any

import pytest
import tokenizers
import torch
from taught_text import TAUGHT
from tokenizers import Regex, decoders, models, pre_tokenizers

from p828.config import TokenizerConfig
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer
from p828.model.init import initialise
from p828.model.loss import linear_cross_entropy
from p828.model.transformer import Transformer
from tiny import tiny_config

EOS = "<|endoftext|>"


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    """A token a character, so that text tells exactly which tokens there were; 90 of the tiny model's 97."""
    vocabulary = {character: i for i, character in enumerate(" " + string.printable[:88])} | {EOS: 89}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    split: Any = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.pre_tokenizer = split
    fuse: Any = decoders.Fuse()
    inner.decoder = fuse
    inner.add_special_tokens([EOS])
    return Tokenizer(inner, EOS)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Byte-level BPE that has never seen an emoji, which is therefore four tokens."""
    return train_tokenizer(TokenizerConfig(vocab_size=280), ["the cat and the dog sat on the mat " * 10])


@pytest.fixture(scope="session")
def taught(byte_level: Tokenizer) -> Transformer:
    """A tiny model that knows one document by heart, its end included."""
    with torch.random.fork_rng():
        model = Transformer(tiny_config(vocab_size=288))
        initialise(model, seed=0)
    ids = torch.tensor([[byte_level.eos_id, *byte_level.encode(TAUGHT), byte_level.eos_id]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        hidden_TH = model(ids[:, :-1]).hidden_BSH.flatten(0, 1)
        loss = linear_cross_entropy(hidden_TH, model.head_weight, ids[0, 1:]) / (ids.numel() - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model
