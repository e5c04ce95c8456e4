"""A rank whose tokens all go to one expert, beside one whose tokens go to many."""

from pathlib import Path

import pytest
import torch
from launch import SHARDED, Stage, assert_same_training, final_state, steps, train, write_config

from p828.inference.load import load_model
from runs import write_text

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.long]
WORD = " ab"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose rows are by turns ordinary text and one token again and again.

    Of two ranks with one row in a micro-batch, the second has only the latter. Its tokens attend to values that are
    all the same, so that all have the same hidden state and take the same expert.
    """
    directory = tmp_path_factory.mktemp("uneven")
    ordinary = str(write_text(directory / "text") / "*.txt")
    (directory / "one.md").write_text(WORD * 20_000)
    sources = {"ordinary": ordinary, "one": str(directory / "one.md")}
    mixture = [{"name": name, "source": "files", "files": [file], "weights": [0.5]} for name, file in sources.items()]
    return write_config(
        directory,
        # A single weight, normalised, is 1: the router would have no gradient but the noise of rounding. A sink takes
        # less of an attention among more tokens: their states would differ.
        model={"num_experts_per_tok": 1, "norm_topk_prob": False, "attention_sinks": False},
        data={"mixture": mixture, "validation": {"kind": "files", "files": [ordinary]}, "shuffle_rows": 1},
        train={"micro_batch_size": 1},
        balance={"update_rate": 0.01},
        optimizer={"learning_rate": 3e-3},
    )


@pytest.fixture(scope="module")
def alone(uneven: Path) -> Path:
    """The run on one device, which is checked to be what it should."""
    run = uneven.parent / "runs" / "alone"
    train(uneven, run, None, 1)
    last = steps(run)[-1]
    assert last["source_tokens"]["one"] == last["source_tokens"]["ordinary"]
    # Two of a step's four rows are of the one token: they alone give an expert of each layer 64 tokens.
    assert all(max(load_E) >= 64 for line in steps(run) for load_E in line["load"])
    loaded = load_model(str(run), "cpu")
    tokens = loaded.tokenizer.encode(WORD * 32)
    assert len(set(tokens)) == 1
    loads_LE = loaded.model(torch.tensor([tokens])).router.loads_LE
    assert loads_LE.max(dim=1).values.tolist() == [32, 32]
    return run


@pytest.mark.parametrize("stage", [*range(4), *SHARDED])
def test_all_tokens_of_a_rank_to_one_expert(uneven: Path, alone: Path, stage: Stage) -> None:
    run = uneven.parent / "runs" / f"stage-{stage}"
    train(uneven, run, stage, 2)
    assert_same_training(run, alone)
    ours, theirs = (final_state(of_run).tensors["model"] for of_run in (run, alone))
    biases = [name for name in ours if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(ours[name].any() and torch.equal(ours[name], theirs[name]) for name in biases)
