"""Time a training step with GPT-2's vocabulary of 50,257 beside the next multiples of 8 and 64, and the head alone.

usage: python benchmarks/odd_sizes.py [--shape 800m] [--experts 12 --width 1408] [--steps 10] [--device cuda]

Every step is timed in a process of its own. MFU is a share of a large matrix product measured in the same run; it
counts matrix products and attention within documents, with the vocabulary of each row. The last column is a row's
tokens a second beside those of the row with a multiple of 64 and the same experts.
"""

import argparse
import dataclasses
import statistics

import torch

from p828.bench.process import measure_apart
from p828.bench.rows import Row, make_row
from p828.bench.systems import System, load_shape
from p828.config import Config
from p828.model.backend import LOSS_CHUNK_TOKENS, LOSS_COLUMNS
from p828.model.loss import loss_and_gradients
from p828.system.timing import step_seconds

VOCABULARIES = (50304, 50264, 50257)
TOKENS = 4  # chunks of the head that are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="800m")
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--width", type=int, default=1408)
    parser.add_argument("--gradient-accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    config = load_shape(given.shape, given.device, 0, given.gradient_accumulation)
    machine = measure_apart({"kind": "machine", "device": given.device})
    print(f"{machine['device']}, torch {machine['torch']}, {machine['matmul_flops'] / 1e12:.3g} TFLOP/s", flush=True)

    print(f"{'vocabulary':>11}{'experts':>9}{'width':>7}{'ms':>9}{'tokens/s':>11}{'MFU':>7}{'ratio':>7}", flush=True)
    own = (config.model.n_routed_experts, config.model.moe_intermediate_size)
    for experts, width in dict.fromkeys((own, (given.experts, given.width))):
        aligned = None
        for vocabulary in VOCABULARIES:
            sizes = {"vocab_size": vocabulary, "n_routed_experts": experts, "moe_intermediate_size": width}
            changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
            row = measure(changed, given.steps, machine["matmul_flops"])
            aligned = aligned or row
            print(
                f"{vocabulary:>11,}{experts:>9}{width:>7,}{row.ms:>9.2f}{row.tokens_per_second:>11,.0f}{row.mfu:>7.1%}"
                f"{row.tokens_per_second / aligned.tokens_per_second:>7.3f}",
                flush=True,
            )
    time_head(config.model.hidden_size, given.steps, torch.device(given.device))


def measure(config: Config, steps: int, matmul_flops: float) -> Row:
    system = System("p828", "p828", config)
    job = {"kind": "system", "system": system.to_dict(), "routing": "model", "steps": steps, "breakdown": False}
    return make_row("", "model", "p828", "p828", config, measure_apart(job), matmul_flops)


def time_head(hidden: int, steps: int, device: torch.device) -> None:
    """Head and loss alone, forward and backward, with rows of logits filled up to multiples of so many columns."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, before = TOKENS * LOSS_CHUNK_TOKENS[device.type], LOSS_COLUMNS[device.type]
    print(f"\nhead and loss of {tokens:,} tokens of {hidden:,}:")
    for vocabulary in VOCABULARIES:
        hidden_TH = torch.randn(tokens, hidden, device=device, dtype=dtype)
        weight_VH = 0.02 * torch.randn(vocabulary, hidden, device=device, dtype=dtype)
        targets_T = torch.randint(vocabulary, (tokens,), device=device)
        dweight_VH, scale = torch.zeros_like(weight_VH, dtype=torch.float32), torch.ones((), device=device)
        for columns in (1, 8, 64, 128):
            LOSS_COLUMNS[device.type] = columns

            def run(arguments: tuple[torch.Tensor, ...] = (hidden_TH, weight_VH, targets_T, scale, dweight_VH)) -> None:
                loss_and_gradients(*arguments)

            step_seconds(run, 2, device)
            seconds = statistics.median(step_seconds(run, steps, device))
            print(f"{vocabulary:>11,} logits in multiples of {columns:>3}: {seconds * 1e3:8.2f} ms", flush=True)
    LOSS_COLUMNS[device.type] = before


if __name__ == "__main__":
    main()
