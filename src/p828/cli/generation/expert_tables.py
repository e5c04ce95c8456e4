"""Which experts tokens went through, as tables of text; where they are wider than `width`, in blocks of columns."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from p828.cli.output import printable
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.expert_use import ExpertLoads, ExpertUse

WIDEST_TOKEN = 16  # columns of a token's text
GAP = "  "
LONGEST_BAR = 50  # for all of a layer's choices
BESIDE_BAR = 32  # columns
MOST_LISTED = 16  # experts of a layer in the statistics: with more, the most and the least used


def token_table(tokenizer: Tokenizer, use: ExpertUse, prompt_length: int, width: int) -> list[str]:
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
        *_blocks(left, columns, width, align_right=False),
    ]


def load_table(loads: ExpertLoads, width: int) -> list[str]:
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
    return [head, "", *_blocks(left, columns, width, align_right=True)]


def statistics(loads: ExpertLoads, width: int) -> list[str]:
    """Project 828's expert usage statistics: a layer's experts from the most used, and how even they are."""
    lines = ["Expert Usage Statistics"]
    longest = min(LONGEST_BAR, max(width - BESIDE_BAR, 8))
    digits = max(len(str(max(counts_E))) for counts_E in loads.counts_LE)
    for layer, counts_E in enumerate(loads.counts_LE):
        shares, (mean, deviation) = loads.shares(layer), loads.spread(layer)
        order = sorted(range(loads.experts), key=lambda expert: -counts_E[expert])
        rows = []
        for expert in order:
            count, share = counts_E[expert], shares[expert]
            rows.append(
                f"    Expert {expert:2d}: {count:{digits}d} ({share:6.1%}) {'█' * int(longest * share)}".rstrip()
            )
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


def _blocks(left: Sequence[str], columns: Sequence[Sequence[str]], width: int, align_right: bool) -> list[str]:
    """The rows, with as many columns beside each other as fit, and the others below with the same left part."""
    room = width - cell_len(left[0])
    blocks: list[list[list[str]]] = [[]]
    used = 0
    for column in columns:
        own = max(map(len, column))
        if blocks[-1] and used + len(GAP) + own > room:
            blocks.append([])
            used = 0
        used += len(GAP) + own
        blocks[-1].append([f"{text:>{own}}" if align_right else f"{text:<{own}}" for text in column])
    lines: list[str] = []
    for number, block in enumerate(blocks):
        lines += [""] if number else []
        lines += [GAP.join(cells).rstrip() for cells in zip(left, *block, strict=True)]
    return lines
