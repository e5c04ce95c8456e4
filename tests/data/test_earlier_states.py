"""States that an earlier version saved go on with the samples that it gave next.

`earlier_version/` has a directory that it prepared and, for each kind of source, the state of two ranks after 52
batches, and what the 24 batches after it were. Its text is made anew by `data_samples.text`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import open_run_loader, text, write_jsonl

from p828.config import Config, DataConfig, MixedSource, TrainConfig, ValidationConfig
from p828.data.tokenizer.tokenizer import Tokenizer

EARLIER = Path(__file__).parent / "earlier_version"
SAVED: dict[str, Any] = json.loads((EARLIER / "states.json").read_text())
FILES = ("texts/*.jsonl",)
PREPARED = str(EARLIER / "prepared")
KINDS: dict[str, dict[str, Any]] = {
    "streams": {"streams": 3},
    "more streams than shards": {"streams": 8},
    "best fit": {"streams": 2, "packing": "best_fit"},
    "prepared": {"prepared": PREPARED},
    "mixture": {
        "streams": 2,
        "mixture": (
            MixedSource(name="prepared", weights=(1.0, 0.3), prepared=PREPARED, source="files", files=FILES),
            MixedSource(name="text", weights=(0.5, 0.7), source="files", files=("texts/[0-2].jsonl",)),
        ),
        "mixture_steps": (0, 7),
    },
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on(kind: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # prepared data and its source are known by relative paths
    for shard, count in enumerate((40, 3, 60, 25)):
        write_jsonl(Path(f"texts/{shard}.jsonl"), [text(100 * shard + i) for i in range(count)])
    data = DataConfig(
        source="files", files=FILES, sequence_length=31, block_documents=9, shuffle_rows=16,
        validation=ValidationConfig(fraction=0.1), **KINDS[kind],
    )  # fmt: skip
    config = Config(data=data, train=TrainConfig(micro_batch_size=2, gradient_accumulation=4 // ranks, seed=3))
    tokenizer = Tokenizer.from_file(EARLIER / "prepared/tokenizer.json", "<|endoftext|>")
    loaders = [open_run_loader(config, tokenizer, rank=rank, world_size=ranks) for rank in range(ranks)]
    for loader in loaders:
        loader.load_state_dict(SAVED[kind]["state"])
    found = [next(loaders[i % ranks]) for i in range(24)]
    for loader in loaders:
        loader.close()
    told = [[b.hash, b.documents, b.split_documents, b.epoch, *b.source_tokens] for b in found]
    assert told == SAVED[kind]["after"]
