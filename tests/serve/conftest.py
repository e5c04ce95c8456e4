from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from serving import Served, save_tiny, serving


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture(scope="session")
def served(chat_run: Path) -> Iterator[Served]:
    with serving(chat_run) as found:
        yield found


@pytest.fixture(scope="session")
def openai_client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client
