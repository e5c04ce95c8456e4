"""The table of docs/interchange.md: what a model is exported as, and how far transformers' logits are from ours.

    python benchmarks/interchange.py [RUN ...]

Each row is a model of 4 layers of width 256 with random weights, in which every part matters; each RUN is a row more,
of its newest checkpoint. Compared are all tokens of the context, 1,024 for random weights and at most 4,096 for a RUN,
in float32 on a CPU, twice: as they are, and behind padding on the left with the positions that `generate` gives them.
The difference is the largest of any logit, relative to the largest logit. A star: two experts' scores were so near that
roundings decided, and what follows that token is left out.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from exported import compare, load, save_model
from p828.config import RopeScaling
from p828.inference.load import load_model
from p828.interchange.export import export_model
from p828.model.precision import is_matrix
from p828.model.transformer import Transformer
from tiny import tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "head_dim": 32, "max_position_embeddings": 1024,
}  # fmt: skip
YARN = {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=256)}
NO_SINKS, NO_SHARED = {"attention_sinks": False}, {"n_shared_experts": 0}
TOP_1 = {"n_routed_experts": 64, "num_experts_per_tok": 1}
GROUPS = {"n_routed_experts": 64, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
ROWS: dict[str, dict[str, Any]] = {
    "no sinks": NO_SINKS,
    "no sinks, norms on q and k": {**NO_SINKS, "use_qk_norm": True},
    "no sinks, no shared expert": {**NO_SINKS, **NO_SHARED},
    "no sinks, 64 experts, top 1": {**NO_SINKS, **TOP_1},
    "no sinks, 64 experts, top 8 from 4 of 8 groups": {**NO_SINKS, **GROUPS},
    "no sinks, YaRN by 4 from 256 tokens": {**NO_SINKS, **YARN},
    "sinks, no shared expert": NO_SHARED,
    "sinks, no shared expert, 64 experts, top 1": {**NO_SHARED, **TOP_1},
    "sinks, no shared expert, 64 experts, top 8 from 4 of 8 groups": {**NO_SHARED, **GROUPS},
    "sinks, no shared expert, YaRN by 4 from 256 tokens": {**NO_SHARED, **YARN},
    "sinks, shared expert (the default)": {},
    "sinks, shared expert, norms on q and k, YaRN by 4 from 256 tokens": {**YARN, "use_qk_norm": True},
    "softmax router": {"scoring_func": "softmax"},
    "`swiglu_of_product`": {"hidden_act": "swiglu_of_product"},
}
MOST_TOKENS, PADDING = 4096, 16


def main() -> None:
    print("| model | exported as | largest difference | with padding |", "|---|---|---:|---:|", sep="\n")
    for words, changes in ROWS.items():
        model = random_model(changes)
        with tempfile.TemporaryDirectory() as directory:
            row(words, model, save_model(Path(directory) / "run", model))
    for run in sys.argv[1:]:
        row(f"trained: {run}", load_model(run, "cpu").model, Path(run))


def random_model(changes: dict[str, Any]) -> Transformer:
    """The tests' model, with the smaller weights that fit a larger width: no product grows what goes through it."""
    model = tiny_model(**{**SIZES, **changes})
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter.ndim):
            parameter.data.mul_(0.5)
    return model


@torch.no_grad()
def row(words: str, model: Transformer, run: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        architecture = export_model(run, Path(directory) / "export").architecture
        theirs = load(Path(directory) / "export")
    length = min(model.config.max_position_embeddings, MOST_TOKENS)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((tokens.new_zeros(1, PADDING), tokens), dim=1)[:, :length]
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    alone = compare(model, theirs, tokens)
    behind = compare(model, theirs, tokens[:, :-PADDING], input_ids=padded, attention_mask=mask, position_ids=positions)
    numbers = " | ".join(f"{found.difference:.1e}{' *' if found.ties else ''}" for found in (alone, behind))
    print(f"| {words} | `{architecture.model_type}` | {numbers} |", flush=True)


main()
