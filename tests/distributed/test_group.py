"""What a rank says when it cannot tell the others."""

import pytest

from p828.distributed.group import ProcessGroup
from p828.errors import ConfigError


def fail() -> None:
    raise ConfigError("the first")


def test_an_error_is_not_hidden_by_that_of_telling_it() -> None:
    alone = ProcessGroup(0, 2)  # of two, without the process group that would join them
    with pytest.raises(ConfigError, match="the first"), alone.raise_together():
        fail()
    with pytest.raises(ConfigError, match="the first"):
        alone.on_rank_0(fail)
    with pytest.raises(ValueError, match="process group"), alone.raise_together():
        pass
