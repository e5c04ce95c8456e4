"""Draw how the speed of a GPU holds as GPUs are added, from what `scaling.py --json` wrote. Needs matplotlib.

usage: python benchmarks/scaling_figure.py RESULTS.json [MORE.json ...] PICTURE.svg

For each system and number of GPUs n: tokens a second of a GPU as a share of the plain engine's on one GPU. A row that
is in several files counts as the later one has it. The rows as drawn are printed as a table, too.

Eight GPUs are predicted, and dashed. T(n) is the seconds of a step on n GPUs, where T(1) is the same system's or, if it
was not run on one, the plain engine's; C(n) the seconds in which a collective operation runs; B the bytes that a rank
passes to such operations in a step:

    L(n) = B (n - 1) / n               bytes over a GPU's link, of B that are scattered, gathered or exchanged
    C(n) = L(n) / r + a (n - 1)        r: the link's rate, a: of each of the n - 1 steps of a ring
    s = (T(m) - T(1)) / C(m)           the share of C by which a step is longer: exposed, or slowing what runs beside it
    T(8) = T(1) + s C(8)

m is the largest number of GPUs that was measured. r and a are those that give C at the two largest; a is not below 0,
and is 0 where only one was measured. The cost of a ring is that of Thakur, Rabenseifner, Gropp 2005, "Optimization of
Collective Communication Operations in MPICH", section 4.1. As a check, m itself is predicted from those below it.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

PREDICTED = 8
NAMES = {  # and the colour of each: readable on white and on black
    "sharded-1": ("p828, ZeRO 1", "#4a86c5"),
    "sharded-2": ("p828, ZeRO 2", "#4f9a56"),
    "sharded-3": ("p828, ZeRO 3", "#c58a2e"),
    "torchtitan-2": ("torchtitan, FSDP2, parameters kept", "#8367b8"),
    "torchtitan-3": ("torchtitan, FSDP2, resharded", "#c06060"),
}
GREY = "#7d8590"


class Measured(NamedTuple):
    """A system's step on so many GPUs."""

    gpus: int
    seconds: float
    communication: float
    """Seconds in which a collective operation ran; 0 where that was not measured."""
    passed: float
    """Bytes that a rank passed to collective operations."""


def main() -> None:
    if len(sys.argv) < 3 or not sys.argv[-1].endswith((".svg", ".png")):
        sys.exit(__doc__)
    rows = [row for path in sys.argv[1:-1] for row in json.loads(Path(path).read_text())]
    if len({(row.get("shape"), row.get("gradient_accumulation"), row["device"]) for row in rows}) > 1:
        sys.exit("these rows are of several shapes, accumulations or GPUs: they cannot be compared")
    plain, systems = by_system(rows)
    if plain is None:
        sys.exit("no row of the plain engine, of which the others are shares")
    shares = {name: shares_of(measured, plain) for name, measured in systems.items() if name in NAMES}
    print(table(shares))
    draw(shares, rows[0], Path(sys.argv[-1]))


def by_system(rows: list[dict[str, Any]]) -> tuple[float | None, dict[str, list[Measured]]]:
    """Seconds of the plain engine's step, and of each other system what was measured, fewest GPUs first."""
    plain: float | None = None
    found: dict[str, dict[int, Measured]] = {}
    for row in rows:
        if row["system"] == "plain":
            plain = row["seconds"] if row["gpus"] == 1 else plain
            continue
        communication = (row["occupation"] or [0.0])[0]
        measured = Measured(row["gpus"], row["seconds"], communication, sum(row["passed_bytes"].values()))
        found.setdefault(row["system"], {})[row["gpus"]] = measured
    return plain, {name: [of[gpus] for gpus in sorted(of)] for name, of in found.items()}


class Shares(NamedTuple):
    """Of the plain engine's tokens a second on one GPU, what a GPU of a system reaches, by the number of GPUs."""

    measured: dict[int, float]
    predicted: float | None
    """On eight GPUs; None where too little was measured."""
    checked: float | None
    """What the largest measured number of GPUs was predicted to reach by those below it."""


def shares_of(measured: list[Measured], plain: float) -> Shares:
    def share(seconds: float | None) -> float | None:
        return None if seconds is None else plain / seconds

    return Shares(
        {one.gpus: plain / one.seconds for one in measured},
        share(predicted_seconds(measured, plain, PREDICTED)),
        share(predicted_seconds(measured[:-1], plain, measured[-1].gpus)),
    )


def predicted_seconds(measured: list[Measured], plain: float, gpus: int) -> float | None:
    """T(gpus), as above; None where nothing with communication was measured on fewer GPUs."""
    alone = next((one.seconds for one in measured if one.gpus == 1), plain)
    several = [one for one in measured if 1 < one.gpus < gpus and one.communication and one.passed]
    if not several:
        return None
    most = several[-1]
    felt = max(most.seconds - alone, 0.0) / most.communication
    per_byte, per_step = cost_of_ring(several[-2:])
    return alone + felt * (per_byte * link_bytes(most.passed, gpus) + per_step * (gpus - 1))


def cost_of_ring(measured: list[Measured]) -> tuple[float, float]:
    """1 / r, seconds a byte, and a, seconds a step of the ring."""
    most = measured[-1]
    bytes_over_link = link_bytes(most.passed, most.gpus)
    if len(measured) > 1:
        fewer = measured[0]
        fewer_bytes, fewer_steps, steps = link_bytes(fewer.passed, fewer.gpus), fewer.gpus - 1, most.gpus - 1
        determinant = bytes_over_link * fewer_steps - fewer_bytes * steps
        per_byte = (most.communication * fewer_steps - fewer.communication * steps) / determinant
        per_step = (bytes_over_link * fewer.communication - fewer_bytes * most.communication) / determinant
        if per_byte > 0 and per_step > 0:
            return per_byte, per_step
    return most.communication / bytes_over_link, 0.0


def link_bytes(passed: float, gpus: int) -> float:
    """L(gpus), as above."""
    return passed * (gpus - 1) / gpus


def table(shares: dict[str, Shares]) -> str:
    """The shares, in Markdown."""
    counts = sorted({gpus for of in shares.values() for gpus in of.measured})
    lines = [
        f"| a GPU's tokens/s, of plain on one | {' | '.join(map(str, counts))} | {PREDICTED}, predicted "
        f"| {max(counts)}, predicted from fewer |",
        "|---" * (len(counts) + 3) + "|",
    ]
    for name, of in shares.items():
        cells = [of.measured.get(gpus) for gpus in counts] + [of.predicted, of.checked]
        shown = ["" if cell is None else f"{cell:.1%}" for cell in cells]
        lines.append(f"| {NAMES[name][0]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(shares: dict[str, Shares], row: dict[str, Any], picture: Path) -> None:
    import matplotlib  # only here, so that the arithmetic needs nothing

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grey = dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], GREY)
    plt.rcParams |= {**grey, "svg.fonttype": "none", "svg.hashsalt": "p828", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(8, 4.8))
    axes.plot([1], [100], "s", color=GREY, label="p828, the plain engine")
    for name, of in shares.items():
        label, colour = NAMES[name]
        gpus = sorted(of.measured)
        axes.plot(gpus, [100 * of.measured[n] for n in gpus], "o-", color=colour, linewidth=2, label=label)
        if of.predicted is not None:
            ends = [100 * of.measured[gpus[-1]], 100 * of.predicted]
            axes.plot([gpus[-1], PREDICTED], ends, "o--", color=colour, markerfacecolor="none", markevery=[1])
    axes.set_xscale("log", base=2)
    ticks = sorted({1, PREDICTED, *(n for of in shares.values() for n in of.measured)})
    axes.set_xticks(ticks, [f"{n} (predicted)" if n == PREDICTED else str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 105)
    axes.set_xlabel(f"GPUs of one host ({row['device']})")
    axes.set_ylabel("a GPU's tokens/s, % of the plain engine on one")
    if "shape" in row:
        axes.set_title(f"{row['shape']}, {row['gradient_accumulation']} micro-batches a step", color=GREY, fontsize=11)
    axes.grid(color=GREY, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", fontsize="small")
    figure.tight_layout()
    figure.savefig(picture, transparent=True, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
