import numpy as np
import pytest
import torch

from p828.data.batch import Sample
from p828.data.loader import make_batch
from p828.inference.row_losses import row_losses
from tiny import tiny_model


def test_rows_and_documents_have_their_own_losses() -> None:
    """Against log-softmax in float64 over each document by itself, since documents do not see each other."""
    model = tiny_model().double()
    draw = np.random.default_rng(0)
    lengths = [[5, 9, 7], [21], [11, 4]]
    rows = []
    for row in lengths:
        ids = np.repeat(np.arange(len(row), dtype=np.int32), row)
        rows.append(Sample(draw.integers(0, 97, len(ids)), ids).padded(21, 0))
    found = row_losses(model, [make_batch(rows[:2], True), make_batch(rows[2:], True)], torch.float64)
    assert [len(one.documents) for one in found] == [3, 1, 2]
    for row, one in zip(rows, found, strict=True):
        means, total, count = [], 0.0, 0
        for number in range(len(one.documents)):
            places = np.flatnonzero(row.document_ids == number)
            tokens = torch.from_numpy(row.tokens[places])[None]
            hidden = model(tokens, torch.arange(len(places))[None], torch.zeros_like(tokens), dtype=torch.float64)
            logp = torch.log_softmax(hidden.hidden_BSH[0] @ model.head_weight.T, -1)
            # the last token predicts the next document's first one, and nothing before padding or at the row's end
            next_tokens = row.tokens[places + 1] if places[-1] + 1 < len(row.tokens) else row.tokens[places[1:]]
            if places[-1] + 1 < len(row.tokens) and row.document_ids[places[-1] + 1] < 0:
                next_tokens = next_tokens[:-1]
            losses = [-logp[i, token].item() for i, token in enumerate(next_tokens)]
            means.append(sum(losses) / len(losses))
            total, count = total + sum(losses), count + len(losses)
        assert one.documents == pytest.approx(means)
        assert one.loss == pytest.approx(total / count)
