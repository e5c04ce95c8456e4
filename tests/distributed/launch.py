"""Runs on several ranks, started by a launcher as a user would start them, and what came of them."""

import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import p828
from p828.runs import checkpoint, file_names, records
from p828.runs.compare import OF_THE_MACHINE
from runs import start, wait_for_step, write_text, write_toml

Stage = int | str | None
"""A ZeRO stage of DeepSpeed; one of the sharded engine, as "sharded-2"; or None, the plain engine."""
Run = Callable[[Stage, int], Path]
"""From stage and number of ranks to the directory of a run."""
SHARDED = ("sharded-1", "sharded-2", "sharded-3")

OUR_LAUNCHER = ("-m", "p828.distributed.torchrun", "--standalone", "--nproc-per-node", "2", "-m", "p828")
STEPS = 20
MICRO_BATCHES = 4  # of a step, on all ranks together
WITHIN = 180  # seconds for a run of these to end, on a machine that does other things, too
ENDLESS = ("--train.steps", "100000")
# float32 sums in another order: units of 2^-24 of a loss near 4, which 20 steps of training multiply
PROBES = (
    "future_leak", "document_leak", "row_leak", "position_error", "evaluation_difference", "loss_difference", "reroute",
    "batch_leak", "validation_overlap",
)  # fmt: skip
TOLERANCE = 1e-5


def cases(all_of_them: Iterable[tuple[Any, ...]], short: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test, all but the `short` ones for the long form only."""
    marks = {True: (), False: (pytest.mark.long,)}
    found = [pytest.param(*case, marks=marks[case in short]) for case in all_of_them]
    assert sum(not param.marks for param in found) == len(short)
    return found


def write_config(directory: Path, **sections: dict[str, Any]) -> Path:
    """`tiny_values` for 20 steps, with the given sections' keys changed."""
    return write_toml(directory, **{**sections, "train": {"steps": STEPS, **sections.get("train", {})}})


def config_that_reads_on(directory: Path) -> tuple[Path, Path]:
    """A configuration that reads its texts as it goes, some 50,000 tokens at a time for steps of 8,192; and these."""
    text = write_text(directory / "more", documents=1500, seed=1)
    data = {"files": [str(text / "*.txt")], "sequence_length": 512, "block_documents": 4, "shuffle_rows": 4}
    config = write_config(
        directory,
        model={"max_position_embeddings": 512},
        data={**data, "read_retries": 1},
        train={"micro_batch_size": 4},
        evaluation={"every": 0},
        checkpoint={"every": 900},
    )
    return config, text


def torchrun(ranks: int, *program: str) -> tuple[str, ...]:
    program = program or ("-m", "p828")
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program)


def engine_of(stage: Stage) -> tuple[str, str]:
    """The engine's name and the number of the stage."""
    name, _, number = stage.partition("-") if isinstance(stage, str) else ("deepspeed", "", str(stage))
    return name, number


def flags_of(stage: Stage, ranks: int) -> list[str]:
    """The same batch for any number of ranks, at a ZeRO stage or, without one, with the plain engine."""
    name, number = engine_of(stage)
    engine = [] if stage is None else ["--engine", name, f"--{name}.stage", number]
    return ["--train.gradient-accumulation", str(MICRO_BATCHES // ranks), *engine]


@dataclass(frozen=True)
class Launch:
    """A launcher and the processes that it started."""

    process: subprocess.Popen[str]

    def wait_for_step(self, step: int) -> None:
        wait_for_step(self.process, step)

    def workers(self) -> list[psutil.Process]:
        """The process of each rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        ranks = {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
        return [ranks[rank] for rank in range(len(ranks))]

    def end(self, within: float = WITHIN) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, once all have ended, which they must soon."""
        out, err = self.process.communicate(timeout=within)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """`kill -9` of all of them."""
        if self.process.poll() is None:
            launcher = psutil.Process(self.process.pid)
            for process in (launcher, *launcher.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            self.process.communicate()


@contextmanager
def launched(
    config: Path, run: Path, stage: Stage, ranks: int, *flags: str, launcher: Sequence[str] = ()
) -> Iterator[Launch]:
    """Train a run; whatever still lives when the block ends is killed. Without a stage, in one process."""
    launcher = launcher or (("-m", "p828") if stage is None else torchrun(ranks))
    where = ["--runs-dir", str(run.parent), "--name", run.name]
    arguments = ["train", str(config), *where, *flags_of(stage, ranks), *flags]
    launch = Launch(start(*arguments, cwd=config.parent, launcher=launcher))
    try:
        yield launch
    finally:
        launch.kill()


def train(config: Path, run: Path, stage: Stage, ranks: int, *flags: str) -> str:
    """Train a run to its end; what it printed."""
    with launched(config, run, stage, ranks, *flags) as launch:
        code, out, err = launch.end()
    assert code == 0, err
    return out


def train_and_kill(config: Path, run: Path, stage: Stage, ranks: int, step: int, *flags: str) -> None:
    """`kill -9` all of a run's processes when it has come to a step."""
    with launched(config, run, stage, ranks, *flags) as launch:
        launch.wait_for_step(step)
        launch.kill()
    last = steps(run)[-1]["step"]
    assert step <= last < STEPS, "the run was over before it was killed"


def messages(err: str) -> list[str]:
    """What p828 itself said on standard error, launchers and libraries apart, which no process of it may add to."""
    assert f'File "{Path(p828.__file__).parent}' not in err, err  # a traceback
    return [line for line in err.splitlines() if line.startswith("p828: ")]


def the_message(launch: Launch, within: float = WITHIN) -> str:
    """The one line that a run which failed on all its ranks ends with."""
    code, _, err = launch.end(within)
    assert code != 0
    assert len(messages(err)) == 1, err
    return messages(err)[0]


def records_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in records.read(run / "metrics.jsonl") if line["kind"] == kind]


def steps(run: Path) -> list[dict[str, Any]]:
    return records_of(run, "step")


def assert_same_training(ours: Path, theirs: Path) -> None:
    """The same data and loads of experts at every step; losses and norms but for the order of float32 sums."""
    first, second = steps(ours), steps(theirs)
    for key in ("step", "lr", "tokens", "documents", "cut_documents", "rows", "load"):
        assert [line[key] for line in first] == [line[key] for line in second], key
    assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], abs=TOLERANCE)
    norms = [line["grad_norm"] for line in second]
    assert [line["grad_norm"] for line in first] == pytest.approx(norms, rel=TOLERANCE, abs=0)
    assert_same_numbers(first, second)
    for line in records_of(ours, "probe"):
        assert all(line.get(key, 0) < TOLERANCE for key in PROBES), line
    evaluations = [[(line["step"], line["tokens"]) for line in records_of(run, "eval")] for run in (ours, theirs)]
    assert evaluations[0] == evaluations[1]
    losses = [[line["loss"] for line in records_of(run, "eval")] for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    samples = [[(line["step"], line["samples"]) for line in records_of(run, "sample")] for run in (ours, theirs)]
    assert samples[0] == samples[1]


def assert_same_numbers(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """What is told by part and layer. Norms of more numbers than are sampled differ by the samples."""
    measured = [(ours, theirs) for ours, theirs in zip(first, second, strict=True) if "weight_norms" in theirs]
    assert measured
    for ours, theirs in measured:
        close = ("grad_norms", "router_entropy", "bias_load_correlation", "bias_max")
        for key in (*close, "sink_mean") if "sink_mean" in theirs else close:
            assert ours[key] == pytest.approx(theirs[key], rel=0.01, abs=TOLERANCE), key
        for key in ("weight_norms", "update_ratios", "changed"):
            assert ours[key] == pytest.approx(theirs[key], rel=0.1, abs=TOLERANCE), key


def final_state(run: Path) -> checkpoint.Checkpoint:
    """The checkpoint of the last step, its tensors made whole."""
    return checkpoint.load(run / "checkpoints" / file_names.name_of(steps(run)[-1]["step"]))


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """The same records and, at the end, weights, optimizer, random states and place in the data."""
    timed = ("time", *OF_THE_MACHINE)
    for kind in ("step", "eval", "sample"):
        first, second = ([{**line, **dict.fromkeys(timed)} for line in records_of(run, kind)] for run in (ours, theirs))
        assert first == second
    first, second = final_state(ours), final_state(theirs)
    assert (first.state["progress"], first.state["data"]) == (second.state["progress"], second.state["data"])
    for part in ("model", "optimizer", "random"):
        assert first.tensors[part].keys() == second.tensors[part].keys()
        for name, tensor in first.tensors[part].items():
            assert torch.equal(tensor, second.tensors[part][name]), f"{part}: {name}"
