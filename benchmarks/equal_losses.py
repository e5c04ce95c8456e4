"""Train with the fast paths and without, with two seeds each, and draw the losses. Needs matplotlib.

usage: python benchmarks/equal_losses.py CONFIG PICTURE.png [flags of p828 train]

Without: float32 throughout, attention spelled out, nothing compiled or recorded, PyTorch's own AdamW. On a GPU that is
another code for every part of the step. The runs are kept in runs-equal-losses/.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from p828.runs.records import read

RUNS = Path("runs-equal-losses")
PATHS = {
    "fast": [],
    "plain": ["--train.dtype", "float32", "--model.attention-backend", "reference", "--train.compile", "off"],
}
SEEDS = (1, 2)
WINDOW = 20  # steps that a curve is the mean of


def train(config: str, path: str, seed: int, flags: list[str]) -> npt.NDArray[np.float64]:
    """Each step's loss."""
    name = f"{path}-{seed}"
    place = ["--name", name, "--runs-dir", str(RUNS), "--train.seed", str(seed)]
    subprocess.run([sys.executable, "-m", "p828", "train", config, *place, *PATHS[path], *flags], check=True)
    return np.array([line["loss"] for line in read(RUNS / name / "metrics.jsonl") if line["kind"] == "step"])


def main(config: str, picture: str, flags: list[str]) -> None:
    losses = {(path, seed): train(config, path, seed, flags) for seed in SEEDS for path in PATHS}
    smooth = {key: np.convolve(loss, np.full(WINDOW, 1 / WINDOW), "valid") for key, loss in losses.items()}
    step = np.arange(WINDOW, WINDOW + len(smooth["fast", SEEDS[0]]))

    figure, (curves, differences) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    for path, seed in smooth:
        style = {"color": f"C{SEEDS.index(seed)}", "linestyle": "-" if path == "fast" else ":"}
        curves.plot(step, smooth[path, seed], label=f"{path}, seed {seed}", **style)
    curves.set_ylabel(f"loss, nats per token, mean of {WINDOW} steps")
    pairs = [(f"fast − plain, seed {s}", ("fast", s), ("plain", s)) for s in SEEDS]
    pairs += [(f"seed {SEEDS[1]} − seed {SEEDS[0]}, {p}", (p, SEEDS[1]), (p, SEEDS[0])) for p in PATHS]
    for label, first, second in pairs:
        difference = smooth[first] - smooth[second]
        differences.plot(step, difference, label=label, linestyle="-" if "fast −" in label else ":")
        print(f"{label}: {np.abs(difference).mean():.4f} in the mean, {difference[-1]:+.4f} at the end")
    differences.set_ylabel("difference")
    differences.set_xlabel("step")
    for axes in (curves, differences):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
