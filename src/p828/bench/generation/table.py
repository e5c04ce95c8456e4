"""Rows as text of at most 80 columns, a row at a time."""

import textwrap

from p828.bench.generation.rows import FirstTokenRow, Row, StepRow

WIDTH = 80
LABEL = 20
NOISY = 1.1  # runs further apart than this are shown


def header() -> str:
    return f"{'':<{LABEL}}{_line('ms', 'tok/s', 'of memory', 'sampled tok/s', '× peer')}"


def show_row(row: Row, ratio: float | None) -> str:
    """A line, and one below it where the runs differ or the experts are not those that were counted on."""
    peer = "" if ratio is None else f"{ratio:.2f}"
    if isinstance(row, FirstTokenRow):
        label = f"  1st after {row.prompt_length:,}"
        return f"{label:<{LABEL}}{_line(_ms(row.ms), '', '', '', peer)}".rstrip()
    if not isinstance(row, StepRow):
        label, ratio = f"  at {row.context:,}", row.forward_ms / row.step_ms
        text = f"all of it again {_ms(row.forward_ms)} ms, {ratio:.1f} × the cache's"
        return f"{label:<{LABEL}}{_ms(row.step_ms):>9}  {text}"
    sampled = "" if row.sampled_tokens_per_second is None else f"{row.sampled_tokens_per_second:,.0f}"
    numbers = _line(_ms(row.ms), f"{row.tokens_per_second:,.0f}", f"{row.memory_share:.1%}", sampled, peer)
    lines = [f"{f'  batch {row.batch}':<{LABEL}}{numbers}".rstrip()]
    low, high = row.ms_range
    if high > NOISY * low:
        lines.append(f"    noisy: the runs took {_ms(low)} to {_ms(high)} ms a step")
    if row.distinct_experts is not None and abs(row.distinct_experts / row.expected_experts - 1) > NOISY - 1:
        lines.append(
            f"    {row.distinct_experts:.1f} experts a layer were read, {row.expected_experts:.1f} are counted"
        )
    return "\n".join(lines)


def show_failure(item: str, last_lines: str) -> str:
    lines = [part for line in last_lines.splitlines() for part in textwrap.wrap(line, WIDTH - 4) or [""]]
    return "\n".join([f"  {item}: failed", *(f"    {line}" for line in lines)])


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _line(*cells: str) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 12, 11, 15, 8), strict=True))
