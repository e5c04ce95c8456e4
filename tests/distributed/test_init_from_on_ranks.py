"""Several ranks start from the weights of another model, as one process does."""

from pathlib import Path

import pytest
from launch import SHARDED, Stage, assert_same_training, train

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.long]
SHORT = ("--train.steps", "4", "--schedule.warmup-steps", "1")


@pytest.fixture(scope="module")
def dense(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose layers are one MLP each."""
    run = tmp_path_factory.mktemp("dense") / "dense"
    experts = ("--model.n-routed-experts", "1", "--model.num-experts-per-tok", "1", "--model.n-shared-experts", "0")
    train(config, run, None, 1, *experts, *SHORT)
    return run


@pytest.mark.parametrize("stage", [*range(4), *SHARDED])
def test_the_same_first_weights(config: Path, dense: Path, tmp_path: Path, stage: Stage) -> None:
    """Upcycled to experts in slices, of which each rank reads its own."""
    experts = ("--train.upcycle", "--model.n-routed-experts", "8", "--model.num-experts-per-tok", "4")
    flags = ("--train.init-from", str(dense), *experts, "--model.moe-intermediate-size", "16", *SHORT)
    for name, place in (("one", (None, 1)), ("ranks", (stage, 2))):
        assert "upcycled to 8 experts" in " ".join(train(config, tmp_path / name, *place, *flags).split())
    assert_same_training(tmp_path / "ranks", tmp_path / "one")


def test_a_source_that_is_not_there(config: Path, tmp_path: Path) -> None:
    """Every rank ends, and one of them says why; the launcher's summary has it once more for each."""
    with pytest.raises(AssertionError, match="no such directory") as caught:
        train(config, tmp_path / "run", 3, 2, "--train.init-from", str(tmp_path / "none"))
    said = [line for line in str(caught.value).splitlines() if line.startswith("p828: train.init_from")]
    assert len(said) == 1
    assert not (tmp_path / "run").exists()
