"""A run's logits in llama.cpp, by llama-cpp-python, beside p828's own, on a CPU.

    pip install llama-cpp-python==0.3.36   # compiles for some minutes
    python benchmarks/llama_cpp_logits.py runs/NAME

For each dtype of the file: the largest difference of a logit, relative to the largest logit, over all tokens of a text
and all rows of the vocabulary; the largest difference of a log-probability in nats; the difference of the text's mean
loss; and how many of 40 greedy tokens are p828's. The text is the beginning of README.md.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from p828.inference.load import LoadedModel, load_model
from p828.interchange.gguf import Dtype, export_gguf

TEXT = Path(__file__).parent.parent / "README.md"
GREEDY = 40
FLOAT32 = 0  # GGML_TYPE_F32, for the keys and values, which are float16 by default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's directory or a checkpoint's")
    parser.add_argument("--tokens", type=int, default=512, help="of the text, at most the model's context")
    given = parser.parse_args()
    loaded = load_model(given.run, "cpu")
    context = min(loaded.config.model.max_position_embeddings, given.tokens)
    tokens = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:context]
    expected = logits(loaded, tokens)
    print(f"{len(tokens)} tokens, {expected.shape[1]} rows; logits up to {expected.abs().max():.1f}")
    for dtype in get_args(Dtype):
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.gguf"
            architecture = export_gguf(given.run, file, dtype).architecture
            print(f"{architecture} {dtype:>8}: {compared(file, loaded, tokens, expected)}", flush=True)


@torch.no_grad()
def logits(loaded: LoadedModel, tokens: list[int]) -> Tensor:
    """(S, V) in float32."""
    return loaded.model.logits(loaded.model(torch.tensor([tokens]), dtype=loaded.dtype).hidden_BSH)[0]


def compared(file: Path, loaded: LoadedModel, tokens: list[int], expected: Tensor) -> str:
    from llama_cpp import Llama

    llama = Llama(
        str(file), n_ctx=len(tokens) + GREEDY, n_batch=len(tokens), logits_all=True, type_k=FLOAT32, type_v=FLOAT32,
        flash_attn=False, verbose=False,
    )  # fmt: skip
    llama.eval(tokens)
    found = torch.from_numpy(np.array(llama.scores[: len(tokens)]))
    difference = (found - expected).abs().max() / expected.abs().max()
    logs, expected_logs = found.log_softmax(dim=-1), expected.log_softmax(dim=-1)
    target = torch.tensor(tokens[1:])[:, None]
    loss, expected_loss = (-x[:-1].gather(1, target).mean() for x in (logs, expected_logs))
    return (
        f"logits within {difference:.1e}, log-probabilities within {(logs - expected_logs).abs().max():.1e}, "
        f"loss {loss:.5f} for {expected_loss:.5f}, {same_greedy(llama, loaded, tokens[:64])} of {GREEDY} greedy tokens"
    )


def same_greedy(llama: Any, loaded: LoadedModel, prompt: list[int]) -> int:
    """Tokens of llama.cpp's greedy continuation up to the first that is not p828's."""
    llama.reset()
    llama.eval(prompt)
    tokens = list(prompt)
    for number in range(GREEDY):
        chosen = int(np.argmax(llama.scores[llama.n_tokens - 1]))
        if chosen != int(logits(loaded, tokens)[-1].argmax()):
            return number
        tokens.append(chosen)
        llama.eval([chosen])
    return GREEDY


if __name__ == "__main__":
    main()
