"""What the tests of models in transformers share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers would keep the code of the exports that it loads in the user's cache."""
    from transformers import dynamic_module_utils

    directory = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", directory)
        patch.syspath_prepend(directory)
        yield
