"""lm-eval's `local-completions` asks the server, and finds what p828's own adapter finds on the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from serving import CONTEXT, NAME, Served

from p828.inference.loglikelihood import Request
from p828.inference.tasks.task_model import TaskModel
from p828.interchange.export import export_model

PAIRS = [
    ("the cat sat on the", " mat"),
    ("the cat sat on the", " dog and the cat"),
    ("and the dog ", "sat"),  # a space at the context's end
    ("", " the cat"),
    ("the mat 🙂", " é cat"),
    ("the cat and the dog sat on the mat " * 30 + "the", " cat"),  # longer than the context
]


@pytest.fixture(scope="module")
def tokenizer_directory(chat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(chat_run, tmp_path_factory.mktemp("export") / "model").directory


def local_completions(served: Served, tokenizer: Path, **settings: Any) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model=NAME,
        base_url=f"{served.url}/v1/completions",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
        max_retries=1,
        **settings,
    )


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=index)  # type: ignore[arg-type]
        for index, given in enumerate(arguments)
    ]


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 2, "num_concurrent": 3}])
def test_log_likelihoods_are_those_of_the_own_adapter(
    served: Served, tokenizer_directory: Path, settings: dict[str, int]
) -> None:
    loaded = served.loaded
    own = TaskModel(loaded.model, loaded.tokenizer, torch.float32, 400, 2, lambda line: None)
    theirs = local_completions(served, tokenizer_directory, **settings)
    found = theirs.loglikelihood(requests_of("loglikelihood", PAIRS))
    expected = own.loglikelihoods(PAIRS)
    # lm-eval leaves one token of the context free, and so scores the too long one with one token less before it
    assert [nats for nats, _ in found[:-1]] == pytest.approx([score.nats for score in expected[:-1]], abs=1e-4)
    assert [is_greedy for _, is_greedy in found[:-1]] == [score.is_greedy for score in expected[:-1]]
    ids = [loaded.tokenizer.encode(text) for text in PAIRS[-1]]
    (last,) = own.score([Request((ids[0] + ids[1])[-CONTEXT + 1 : -len(ids[1])], ids[1])])
    assert found[-1] == (pytest.approx(last.nats, abs=1e-4), last.is_greedy)


def test_texts_are_scored_in_windows(served: Served, tokenizer_directory: Path) -> None:
    loaded = served.loaded
    own = TaskModel(loaded.model, loaded.tokenizer, torch.float32, 400, 2, lambda line: None)
    texts = ["the cat and the dog", "é 🙂 on the mat"]
    theirs = local_completions(served, tokenizer_directory)
    found = theirs.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(text,) for text in texts]))
    assert found == pytest.approx(own.document_loglikelihoods(texts), abs=1e-4)


def test_continuations_are_those_of_the_own_adapter(served: Served, tokenizer_directory: Path) -> None:
    loaded = served.loaded
    own = TaskModel(loaded.model, loaded.tokenizer, torch.float32, 400, 2, lambda line: None)
    prompts = [context for context, _ in PAIRS[:2]]
    settings = {"until": ["\n", "zzz"], "max_gen_toks": 12, "do_sample": False, "temperature": 0}
    theirs = local_completions(served, tokenizer_directory, batch_size=2)
    found = theirs.generate_until(requests_of("generate_until", [(prompt, settings) for prompt in prompts]))
    assert found == own.continuations(prompts, settings)
    assert any(found)
