"""What a rank says when it cannot tell the others."""

import pytest

from p828.distributed.group import Ranks
from p828.errors import UserError


def fail() -> None:
    raise UserError("the first")


def test_an_error_is_not_hidden_by_that_of_telling_it() -> None:
    alone = Ranks(0, 2)  # of two, without the process group that would join them
    with pytest.raises(UserError, match="the first"), alone.agreed():
        fail()
    with pytest.raises(UserError, match="the first"):
        alone.first(fail)
    with pytest.raises(ValueError, match="process group"), alone.agreed():
        pass
