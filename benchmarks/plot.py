"""Draw a run's record: loss, gradient norm, and the experts' shares of the tokens. Needs matplotlib.

Each expert's share is drawn where the records have all loads, and of every step the least and the greatest of a layer.

usage: python benchmarks/plot.py runs/NAME/metrics.jsonl PICTURE.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from p828.runs.records import read


def main(metrics: Path, picture: Path) -> None:
    lines = list(read(metrics))
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    step = [line["step"] for line in steps]
    loaded = [line for line in steps if "load" in line]  # every step of a small model
    shares_SLE = np.array([line["load"] for line in loaded], dtype=float)
    shares_SLE /= shares_SLE.mean(axis=2, keepdims=True)

    figure, (loss, norm, load) = plt.subplots(3, 1, figsize=(8, 9), sharex=True)
    loss.plot(step, [line["loss"] for line in steps], linewidth=0.6, alpha=0.6, label="training, each step")
    loss.plot([e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o-", color="C3", label="validation")
    loss.set_ylabel("loss, nats per token")
    loss.legend()
    norm.plot(step, [line["grad_norm"] for line in steps], linewidth=0.6)
    norm.set_ylabel("gradient norm before clipping")
    for layer in range(shares_SLE.shape[1]):
        for expert in range(shares_SLE.shape[2]):
            label = f"layer {layer}, expert {expert}"
            load.plot([line["step"] for line in loaded], shares_SLE[:, layer, expert], linewidth=0.6, label=label)
    for key in ("min_share", "max_share") if len(loaded) < len(steps) else ():
        load.plot(step, [line.get(key) for line in steps], color="black", linewidth=0.3, alpha=0.3)
    load.axhline(0.1, color="black", linestyle=":", linewidth=0.8)
    load.set_ylabel("expert's tokens / fair share")
    load.set_xlabel("step")
    if shares_SLE.shape[1] * shares_SLE.shape[2] <= 8:
        load.legend(fontsize="small")
    for axes in (loss, norm, load):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
