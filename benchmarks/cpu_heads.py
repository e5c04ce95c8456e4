"""Products of an output head with a few tokens on a CPU, in float32 and by parts in float16.

    python benchmarks/cpu_heads.py [--vocabulary 49152] [--hidden 512] [--tokens 1 2 4 8 16]

Milliseconds, the fastest of many: as p828 takes the whole product, by oneDNN's order, by both parts in float16, and by
the first part alone, which says which rows may have the largest product.
"""

import argparse
import time
from collections.abc import Callable

import torch

from p828.kernels.decode.cpu import Matrix
from p828.kernels.decode.float16_cpu import float16_matrix

TIMES = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    given = parser.parse_args()
    weight_VH = 0.02 * torch.randn(given.vocabulary, given.hidden)
    started = time.perf_counter()
    parts = float16_matrix(weight_VH, 2)
    assert parts is not None, "FBGEMM is not there"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    print(f"{capability}, {threads} threads; both parts packed in {time.perf_counter() - started:.2f} s")
    matrix, first = Matrix(weight_VH, is_head=True), parts.first_part()
    print("tokens    whole   oneDNN     both    first")
    for tokens in given.tokens:
        x_TH = torch.randn(tokens, given.hidden)
        ways = (matrix, matrix._by_onednn, parts, first)
        print(f"{tokens:6}", *(f"{fastest(way, x_TH):8.2f}" for way in ways), flush=True)


def fastest(product: Callable[[torch.Tensor], object], x_TH: torch.Tensor) -> float:
    """Milliseconds."""
    times = []
    for _ in range(TIMES):
        started = time.perf_counter()
        product(x_TH)
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
