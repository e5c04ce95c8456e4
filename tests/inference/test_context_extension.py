"""`p828 evaluate --context`: perplexity by position, with and without YaRN."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from saved_run import save_run

from p828.cli.main import dispatch
from p828.config import RopeScaling
from p828.data.batch import Batch
from p828.data.tokenizer.tokenizer import Tokenizer
from p828.errors import DataError
from p828.inference.context_extension import losses_by_position, position_table, with_rope_scaling
from p828.model.transformer import Transformer
from tiny import make_documents, tiny_model

YARN = RopeScaling(factor=4, original_max_position_embeddings=16)


def packed(rows: list[list[int]]) -> Batch:
    """Random tokens in documents of these lengths; a third of the targets is left out."""
    generator = torch.Generator().manual_seed(3)
    documents_BS, positions_BS = make_documents(rows)
    tokens_BS, targets_BS = (torch.randint(97, documents_BS.shape, generator=generator) for _ in range(2))
    targets_BS[torch.rand(targets_BS.shape, generator=generator) < 0.3] = -100
    return Batch(tokens_BS, targets_BS, positions_BS, documents_BS, int((targets_BS != -100).sum()))


def test_against_each_tokens_loss() -> None:
    """One target at a time in float64 (RoPE excepted), of models that were made with each scaling."""
    batches = [packed([[30, 10], [17, 23]]), packed([[40]])]
    model = tiny_model()
    found = losses_by_position([model, with_rope_scaling(model, YARN)], batches, 40, torch.float32)

    assert [(one.first, one.last) for one in found] == [(5 * i, 5 * i + 4) for i in range(8)]
    made = [tiny_model().double(), tiny_model(rope_scaling=YARN).double()]
    expected: list[list[list[float]]] = [[[], []] for _ in found]
    for batch in batches:
        for number, double in enumerate(made):
            output = double(batch.tokens_BS, batch.positions_BS, batch.document_ids_BS, dtype=torch.float64)
            logits_BSV = output.hidden_BSH @ double.head_weight.T
            for row in range(len(batch.tokens_BS)):
                for logits_V, target, position in zip(
                    logits_BSV[row], batch.targets_BS[row], batch.positions_BS[row].tolist(), strict=True
                ):
                    if target != -100:
                        expected[position // 5][number].append(F.cross_entropy(logits_V, target).item())
    for one, losses in zip(found, expected, strict=True):
        assert one.tokens == len(losses[0]) > 0
        # Per token the two layers leave about 1e-6.
        assert one.losses == pytest.approx([sum(of) / len(of) for of in losses], rel=1e-5)
        assert one.perplexities == pytest.approx([math.exp(loss or 0) for loss in one.losses])
    with_yarn = [abs(one.losses[0] - one.losses[1]) for one in found]  # type: ignore[operator]
    assert min(with_yarn[1:]) > 1e-4, "YaRN changed nothing"


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_model()
    batch = packed([[20]])
    before = model(batch.tokens_BS).hidden_BSH
    twin = with_rope_scaling(model, YARN)
    assert twin.head_weight.data_ptr() == model.head_weight.data_ptr(), "the weights were copied"
    assert not torch.equal(twin(batch.tokens_BS).hidden_BSH, before)
    assert torch.equal(model(batch.tokens_BS).hidden_BSH, before)


def test_positions_without_a_target() -> None:
    found = losses_by_position([tiny_model()], [packed([[6, 6]])], 20, torch.float32)
    assert [one.last for one in found] == [2, 5, 8, 11, 14, 17, 19]  # ranges of three; seven reach the end
    assert [one.tokens > 0 for one in found] == [True, True, *[False] * 5]
    assert found[2].losses == found[2].perplexities == (None,)
    assert position_table(["plain"], found)[3].split() == ["6", "to", "8", "0", "-"]
    empty = packed([[4]]).without_targets()
    with pytest.raises(DataError, match="no target"):
        losses_by_position([tiny_model()], [empty], 4, torch.float32)


@pytest.fixture
def run(tmp_path: Path, taught: Transformer, byte_level: Tokenizer) -> Path:
    """A run whose rows were 16 tokens."""
    return save_run(tmp_path / "run", taught, byte_level)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.txt").write_text("the cat and the dog sat on the mat " * 9)
    flags = ["--context", "32", "--model.rope-scaling.factor", "2", "--data.files", str(tmp_path / "long.txt")]
    json_flags = ["--json", str(tmp_path / "found.json")]
    assert dispatch(["evaluate", str(run), "--device", "cpu", *flags, *json_flags]) == 0
    out = capsys.readouterr().out
    assert "trained on     16 tokens of context\n" in out
    assert "all rows of 32 tokens" in out
    assert "without YaRN   YaRN, factor 2\n" in out
    rows = [line for line in out.splitlines() if " to " in line]
    assert len(rows) == 8
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["trained_context"] == found["rope_scaling"]["original_max_position_embeddings"] == 16
    assert found["rope_scaling"]["factor"] == 2
    for line, values in zip(rows, found["positions"], strict=True):
        plain, yarn = values["perplexities"]["without YaRN"], values["perplexities"]["YaRN, factor 2"]
        assert line.split()[2:] == [str(values["last"]), str(values["tokens"]), f"{plain:.2f}", f"{yarn:.2f}"]
    # The mean over all positions is the plain evaluation's, which takes the run's own factor of 1.
    assert dispatch(["evaluate", str(run), "--device", "cpu", *flags[4:], "--data.sequence-length", "32"]) == 0
    total = sum(one["tokens"] * one["losses"]["without YaRN"] for one in found["positions"])
    mean = total / sum(one["tokens"] for one in found["positions"])
    assert f"{mean:.5f} nats" in capsys.readouterr().out


def test_documents_that_are_too_short(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--context", "64", "--model.rope-scaling.factor", "4", "--rows", "1"]
    text = run / "text.md"
    text.write_text("a cat")
    assert dispatch(["evaluate", str(run), "--device", "cpu", *flags, "--data.files", str(text)]) == 0
    assert "no position past the trained context has a target" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--context", "40"], "--context 40: at most 16 is accepted, the trained context of 16 times model.rope"),
        (["--context", "40"], "= 1; --model.rope-scaling.factor 2.5 reaches it"),
        (["--context", "40", "--model.rope-scaling.factor", "2"], "at most 32 is accepted"),
        (["--context", "0"], "a whole number of at least 1"),
        (["--context", "8", "--model.rope-scaling.factor", "0.5"], "model.rope_scaling.factor = 0.5: a number of at"),
        (["--context", "8", "--tasks", "cloze_python"], "--context: accepted without --tasks"),
        (["--context", "8", "--data.sequence-length", "8"], "--data.sequence-length: accepted without --context"),
        (["--model.rope-scaling.factor", "2"], "--model.rope-scaling.factor: accepted with --context"),
    ],
)  # fmt: skip
def test_wrong_flags(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str) -> None:
    assert dispatch(["evaluate", str(run), "--device", "cpu", *flags]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert expected in err
    assert len(err.splitlines()) == 1
