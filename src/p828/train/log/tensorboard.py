"""TensorBoard's event files of a run, written by TensorBoard's own library."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from p828.config import Config
from p828.config.values import to_dict
from p828.errors import ConfigError
from p828.train.log.panels import SAMPLES, alert_text

DIRECTORY = "tensorboard"
VERSION = "brain.Event:2"  # of its files: the one in which a start takes back the steps from its own on


class TensorBoardTracker:
    """An event file of this start in `run_dir/tensorboard`, beside those of earlier starts: TensorBoard joins them.

    A rewind is written as a start of the session at the next step, at which TensorBoard drops that step and all later
    ones of before. A row is flushed as it is written.
    """

    key, name = "tensorboard", "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / DIRECTORY
        self.where = f"tensorboard --logdir {run_dir.parent}"
        self.problem = ""
        self._writer: Any = None

    def import_library(self) -> None:
        try:
            import tensorboard.summary.writer.record_writer  # noqa: F401
            import torch.utils.tensorboard.summary  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"trackers.tensorboard = true: TensorBoard cannot be imported: {error}\npip install 'p828[tensorboard]'"
            ) from None

    def start(self) -> None:
        self.import_library()
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            self.directory.mkdir(exist_ok=True)
            is_new = not os.listdir(self.directory)
            self._writer = RecordWriter((self.directory / name).open("xb"))
        except OSError as error:
            raise ConfigError(f"{self.directory}: cannot be written: {error.strerror or error}") from None
        self._add(0, file_version=VERSION)
        if is_new:
            self.rewind(-1)  # the first session's start, which takes nothing back; only further ones do

    def write(self, step: int, numbers: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(number)) for name, number in numbers.items()]
        values += [Summary.Value(tag=name, histo=_by_expert(load_E)) for name, load_E in loads.items()]
        self._add(step, summary=Summary(value=values))

    def samples(self, step: int, samples: Sequence[Sequence[str]]) -> None:
        shown = (f"Prompt\n\n{_code(prompt)}\n\nContinuation\n\n{_code(text)}" for prompt, text in samples)
        self._text(step, SAMPLES, "\n\n".join(shown))

    def alert(self, step: int, finding: Mapping[str, Any]) -> None:
        lines = f"**{finding['severity']}**\n{alert_text(finding)}"
        self._text(step, f"health/{finding['rule']}", lines.replace("\n", "\n\n"))

    def rewind(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def update(self, config: Config) -> None:
        self._text(0, "config", _code(tomli_w.dumps(to_dict(config))))

    def finish(self, exit_code: int) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Nothing of it outlives its thread."""

    def _text(self, step: int, tag: str, text: str) -> None:
        from torch.utils.tensorboard import summary

        self._add(step, summary=summary.text(tag, text))

    def _add(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        self._writer.flush()


def _by_expert(load_E: Sequence[int]) -> Any:
    """A histogram over the experts' numbers, whose bar n has what expert n got."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    ends = range(1, len(load_E) + 1)  # of the bars; TensorBoard cuts off those that are empty, at either end
    used = [expert for expert, load in enumerate(load_E) if load] or [0]
    return HistogramProto(min=used[0], max=used[-1] + 1, num=sum(load_E), bucket_limit=ends, bucket=load_E)


def _code(text: str) -> str:
    """In Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
