"""Which experts tokens went through, as tables of text, cut into blocks of columns where the terminal is narrow."""

import shutil
import sys
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from p828.cli.output import printable
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.expert_use import ExpertLoads, ExpertUse

WIDEST_TOKEN = 16  # columns of a token's text
GAP = "  "
LONGEST_BAR = 50  # for all of a layer's choices
MOST_LISTED = 16  # experts of a layer in the statistics: with more, the most and the least used


def token_table(tokenizer: Tokenizer, use: ExpertUse, prompt_length: int) -> list[str]:
    """A row a token, a column a layer: the experts that it went through, the best first."""
    layers = len(use.experts[0])
    stub = [("", "token")]
    for place, token in enumerate(use.ids):
        stub.append((str(place) + (" " if place < prompt_length else "+"), _shown(tokenizer, token)))
    numbers = max(len(number) for number, _ in stub)
    left = [f"{number:>{numbers}} {set_cell_size(text, _width(stub))}" for number, text in stub]
    columns = []
    for layer in range(layers):
        read = [" ".join(map(str, experts_LK[layer])) for experts_LK in use.experts]
        columns.append([f"layer {layer}", *read, *["not read"] * (len(use.ids) - len(read))])
    return [
        f"experts of {len(use.experts)} tokens, the best first (+: a token that the model made)",
        "",
        *_blocks(left, columns, align_right=False),
    ]


def load_table(loads: ExpertLoads) -> list[str]:
    """A row a layer, a column an expert: its part of the layer's choices, in percent."""
    even = 100 / loads.experts
    left = ["layer", *map(str, range(loads.layers))]
    left = [f"{text:>{len(left[0])}}" for text in left]
    shares = [loads.shares(layer) for layer in range(loads.layers)]
    columns = [
        [f"e{expert}", *(f"{100 * shares[layer][expert]:.1f}" for layer in range(loads.layers))]
        for expert in range(loads.experts)
    ]
    head = f"load: percent of a layer's choices, of {loads.tokens:,} tokens ({even:.3g} is even)"
    return [head, "", *_blocks(left, columns, align_right=True)]


def statistics(loads: ExpertLoads) -> list[str]:
    """Project 828's expert usage statistics: a layer's experts from the most used, and how even they are."""
    lines = ["Expert Usage Statistics"]
    digits = max(len(str(max(counts_E))) for counts_E in loads.counts_LE)
    for layer, counts_E in enumerate(loads.counts_LE):
        shares, (mean, deviation) = loads.shares(layer), loads.spread(layer)
        order = sorted(range(loads.experts), key=lambda expert: -counts_E[expert])
        rows = []
        for expert in order:
            count, share = counts_E[expert], shares[expert]
            rows.append(f"    Expert {expert:2d}: {count:{digits}d} ({share:6.1%}) {_bar(share)}".rstrip())
        if len(rows) > MOST_LISTED:
            half = MOST_LISTED // 2
            rows[half:-half] = [f"    … {len(rows) - 2 * half} others"]
        lines += [
            "",
            f"Layer {layer}:",
            f"  Total routed tokens: {sum(counts_E)}",
            "  Expert distribution:",
            *rows,
            "  Load balance metrics:",
            f"    Mean: {mean:.1f} | Std Dev: {deviation:.1f} | CV: {deviation / mean:.1%}",
        ]
    return lines


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, with its spaces and line ends to be seen."""
    text = tokenizer.decode([token]) or tokenizer.inner.id_to_token(token) or ""
    text = printable(text.replace(" ", "·").replace("\n", "⏎").replace("\t", "→"))
    return text if cell_len(text) <= WIDEST_TOKEN else set_cell_size(text, WIDEST_TOKEN - 1) + "…"


def _width(stub: Sequence[tuple[str, str]]) -> int:
    return max(cell_len(text) for _, text in stub)


def _bar(share: float) -> str:
    return "█" * int(min(LONGEST_BAR, max(_columns() - 32, 8)) * share)


def _columns() -> int:
    """Of the terminal; what is no terminal takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6


def _blocks(left: Sequence[str], columns: Sequence[Sequence[str]], align_right: bool) -> list[str]:
    """The rows, with as many columns beside each other as fit, and the others below with the same left part."""
    room = _columns() - cell_len(left[0])
    blocks: list[list[list[str]]] = [[]]
    used = 0
    for column in columns:
        width = max(map(len, column))
        if blocks[-1] and used + len(GAP) + width > room:
            blocks.append([])
            used = 0
        used += len(GAP) + width
        blocks[-1].append([f"{text:>{width}}" if align_right else f"{text:<{width}}" for text in column])
    lines: list[str] = []
    for number, block in enumerate(blocks):
        lines += [""] if number else []
        lines += [GAP.join(cells).rstrip() for cells in zip(left, *block, strict=True)]
    return lines
