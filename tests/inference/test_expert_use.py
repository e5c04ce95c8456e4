"""Which experts tokens went through, beside a whole pass, and how they are shown."""

import re
from collections import Counter

import numpy as np
import torch

from p828.cli.generation.expert_tables import load_table, statistics, token_table
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.inference.decode.sequence import Wants
from p828.inference.expert_use import ExpertLoads, ExpertUse, prompt_use
from p828.inference.generate import Prompt, open_decoder, pieces
from p828.inference.sampling_config import SamplingConfig
from p828.model.transformer import Transformer
from tiny import tiny_model

CONFIG = SamplingConfig(temperature=1.0, max_new_tokens=9)


def used(model: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]) -> list[ExpertUse]:
    """As the command notes them, of prompts that are continued together."""
    uses = [prompt_use(model, prompt.ids, tokenizer.eos_id, torch.float32) for prompt in prompts]
    with open_decoder(model, tokenizer, torch.float32, [len(prompt.ids) for prompt in prompts], 9) as decoder:
        for piece in pieces(decoder, tokenizer, prompts, CONFIG, wants=Wants(experts=True)):
            uses[piece.place].add(piece.token)
    return uses


def test_experts_are_those_of_a_whole_pass(letters: Tokenizer) -> None:
    """Every token's, in both layers; the loads are those that the model itself counts."""
    model = tiny_model()
    prompts = [Prompt(letters.encode("hello world"), 1), Prompt([], 2), Prompt(letters.encode("a"), 3)]
    loads = ExpertLoads(2, 8)
    expected = torch.zeros(2, 8, dtype=torch.int64)
    for use in used(model, letters, prompts):
        read = use.ids[: len(use.experts)]
        assert len(use.experts) in (len(use.ids), len(use.ids) - 1)
        # in float32 two scores may be near each other, but not so near as to change places here
        assert use.experts == prompt_use(model, read, letters.eos_id, torch.float32).experts
        with torch.no_grad():
            expected += model(torch.tensor([read])).router.loads_LE
        loads.add(use)
    assert loads.counts_LE == expected.tolist()
    assert loads.tokens == expected.sum().item() / (2 * 3)


def test_shares_and_spread() -> None:
    loads = ExpertLoads(1, 4)
    loads.add(ExpertUse([1, 2, 3], [((0, 2),), ((2, 1),), ((2, 0),)]))
    counts = np.array([2, 1, 3, 0])
    assert loads.shares(0) == (counts / 6).tolist()
    assert loads.spread(0) == (counts.mean(), counts.std())
    head, _, names, row = load_table(loads, 80)
    assert "of 3 tokens (25 is even)" in head
    assert (names.split(), row.split()) == (["layer", "e0", "e1", "e2", "e3"], ["0", "33.3", "16.7", "50.0", "0.0"])
    shown = statistics(loads, 80)
    experts = [re.fullmatch(r"    Expert  (\d): (\d) \( *([\d.]+)%\) ?(█*)", line) for line in shown]
    found = [(int(m[1]), int(m[2]), float(m[3]), len(m[4])) for m in experts if m]
    assert found == [(2, 3, 50.0, 24), (0, 2, 33.3, 16), (1, 1, 16.7, 8), (3, 0, 0.0, 0)]
    assert "  Total routed tokens: 6" in shown
    assert shown[-1] == "    Mean: 1.5 | Std Dev: 1.1 | CV: 74.5%"


def test_tables_of_a_narrow_terminal(byte_level: Tokenizer) -> None:
    """Every layer is there, beside the token, and no line is wider."""
    ids = byte_level.encode("The 🙂 mat\n")
    experts = [tuple((layer, layer + 1) for layer in range(12)) for _ in ids[:-1]]
    lines = token_table(byte_level, ExpertUse(ids, experts), 2, 40)
    blocks = "\n".join(lines[2:]).split("\n\n")
    assert max(map(len, lines[2:])) <= 40
    assert len(blocks) > 3
    assert all(len(block.splitlines()) == len(ids) + 1 for block in blocks)
    headers = " ".join(block.splitlines()[0] for block in blocks)
    assert re.findall(r"layer \d+", headers) == [f"layer {layer}" for layer in range(12)]
    assert Counter(" ".join(lines).split())["not"] == 12
    marks = [line.split()[0] for line in blocks[0].splitlines()[1:]]
    assert marks == ["0", "1", *(f"{place}+" for place in range(2, len(ids)))]
    loads = ExpertLoads(2, 48)
    loads.add(ExpertUse([1, 2], [((3,), (4,))]))
    assert max(map(len, load_table(loads, 40)[2:])) <= 40
    listed = statistics(loads, 40)
    assert max(map(len, listed)) <= 60
    assert sum(line.startswith("    Expert ") for line in listed) == 2 * 16
    assert listed.count("    … 32 others") == 2
