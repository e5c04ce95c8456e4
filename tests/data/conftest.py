import pytest
from data_samples import text

from p828.config import TokenizerConfig
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.data.tokenizer.training import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=320), [text(i) for i in range(200)])
