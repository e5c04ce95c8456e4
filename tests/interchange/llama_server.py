"""llama.cpp on this machine's CPU, by the wheel `xllamacpp`: what it makes of an exported file."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from torch import Tensor

CONTEXT = 128


def running(file: Path) -> xllamacpp.Server:
    """llama.cpp with the file, all its arithmetic in float32 but for products with weights of fewer bits."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = CONTEXT
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # float16 by default
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.n_parallel = parameters.cpuparams.n_threads = 1
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = 0
    return xllamacpp.Server(parameters)


def continued(server: xllamacpp.Server, prompt: list[int], tokens: int, rows: int) -> tuple[list[int], Tensor]:
    """The greedy continuation, and each of its tokens' log-probabilities over the vocabulary: (tokens, rows)."""
    request = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "n_probs": rows, "cache_prompt": False}
    answer = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    found = torch.full((len(answer), rows), float("nan"))
    for place, token in enumerate(answer):
        for candidate in token["top_logprobs"]:
            found[place, candidate["id"]] = candidate["logprob"]
    return [token["id"] for token in answer], found


def tokenized(server: xllamacpp.Server, text: str, has_special_tokens: bool = False) -> list[int]:
    """As `llama-server` makes tokens of text; one that spells a special token is ordinary text unless it has them."""
    tokens: list[int] = asked(server, "tokenize", content=text, add_special=True, parse_special=has_special_tokens)[
        "tokens"
    ]
    return tokens


def written(server: xllamacpp.Server, messages: list[dict[str, str]]) -> str:
    """A conversation as the file's chat template writes it, up to where the assistant begins."""
    text: str = asked(server, "apply-template", messages=messages)["prompt"]
    return text


def asked(server: xllamacpp.Server, what: str, **values: Any) -> Any:
    body = json.dumps(values).encode()
    request = urllib.request.Request(f"{server.listening_address}/{what}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)
