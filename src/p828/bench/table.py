"""Rows as text of at most 80 columns, a row at a time."""

import textwrap
from typing import Any

from p828.bench.rows import Row, fastest
from p828.data.fractions import short

WIDTH = 80
LABEL = 24
NOISY = 1.1  # quartiles further apart than this are shown


def header() -> str:
    numbers = _line("ms", "tok/s", "MFU", "TFLOP/s", "peak GB", "1st s", "× peer")
    return f"{'a micro-batch':<{LABEL}}{numbers}"


def show_row(row: Row, best_peer: Row | None) -> str:
    """Two lines or more: the figures beside the label, and what was measured below."""
    ratio = f"{row.tokens_per_second / best_peer.tokens_per_second:.2f}" if best_peer else ""
    first, *rest = textwrap.wrap(row.system, LABEL - 1)
    numbers = _line(
        f"{row.ms:.2f}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.mfu:.1%}",
        f"{row.tflops:.3g}" if row.tflops < 100 else f"{row.tflops:.0f}",
        f"{row.peak_memory_bytes / 1e9:.2f}",
        f"{row.first_step_seconds:.1f}",
        ratio,
    )
    low, high = row.ms_quartiles
    if high > NOISY * low:
        rest.append(f"  noisy: the middle half of the steps took {low:.2f} to {high:.2f} ms a micro-batch")
    # p828's optimizer keeps the rest of every bfloat16 weight.
    masters = ", float32 masters" if (row.framework, row.weights) == ("p828", "bfloat16") else ""
    what = (
        f"{row.framework} {row.version}; {short(row.parameters)} parameters; "
        f"{row.weights} weights{masters}, {row.moments} moments"
    )
    rest.append(textwrap.fill(what, WIDTH, initial_indent="  ", subsequent_indent="    "))
    return "\n".join([f"{first:<{LABEL}}{numbers}".rstrip(), *rest])


def show_failure(system: str, last_lines: str) -> str:
    lines = [part for line in last_lines.splitlines() for part in textwrap.wrap(line, WIDTH - 4) or [""]]
    return "\n".join([f"{system}: failed", *(f"    {line}" for line in lines)])


def show_ratios(own: list[Row], peers: list[Row]) -> list[str]:
    """p828's first row against each peer, and what its extras cost."""
    if not own:
        return []
    lines = [
        f"{own[0].system} against {peer.system}: {own[0].tokens_per_second / peer.tokens_per_second:.2f} × tok/s, "
        f"{own[0].peak_memory_bytes / peer.peak_memory_bytes:.2f} × peak memory"
        for peer in peers
    ]
    if len(own) > 1:
        lines.append(f"sinks, q/k norm and document masking: {own[0].ms / own[1].ms - 1:+.1%} time")
    return [wrapped for line in lines for wrapped in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]


def show_breakdown(breakdown: dict[str, Any]) -> str:
    """Parts of a step and its longest kernels, in ms a micro-batch and as shares of the time."""
    lines = [f"{'part':<{LABEL}}{'ms':>9}{'share':>8}"]
    lines += [f"{name:<{LABEL}}{ms:>9.3f}{ms / breakdown['ms']:>8.1%}" for name, ms in breakdown["parts"].items()]
    lines += ["", f"{'ms':>9}{'times':>8}  longest kernels"]
    lines += [
        f"{kernel['ms']:>9.3f}{kernel['times']:>8.1f}  {_shortened(kernel['name'], 38)}  {kernel['part']}"
        for kernel in breakdown["kernels"]
    ]
    return "\n".join(lines)


def best_of(rows: list[Row]) -> Row | None:
    return fastest([row for row in rows if row.framework != "p828"])


def _line(*cells: str) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 11, 7, 8, 8, 6, 7), strict=True))


def _shortened(text: str, width: int) -> str:
    return f"{text:<{width}}" if len(text) <= width else text[: width - 1] + "…"
