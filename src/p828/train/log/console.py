"""What a training run shows: a progress bar at a terminal, plain lines elsewhere, and both in `run_dir/log.txt`."""

import contextlib
import errno
import math
import os
import re
import sys
import textwrap
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.style import Style
from rich.text import Text

from p828.errors import ConfigError, RecordsFailed
from p828.files import open_appended
from p828.runs.file_names import LOG_FILE
from p828.runs.records import NO_ROOM

LINES_PER_RUN = 20  # a plain progress line comes at least this many times in a run
SECONDS_PER_LINE = 60.0  # and at least this often in a long run
LOSSES = 10  # steps whose mean loss is shown
A_WAIT = 2.0  # seconds after which a wait is reported
LONG_STEP = 10.0  # seconds after which a step's micro-batches are reported
PER_DRAWING = 0.25  # seconds between movements of the bar within a step
WIDEST_BLOCK = 100
LARGEST_PLAIN = 1e4  # a loss above it is shown with an exponent
SPEED_SECONDS = 600.0  # the time left follows the speed over this long, evaluations included
ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format, surrogates, private, unassigned
TAB = "    "


class _Output(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Instead of ending the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Console:
    """Shows a run; a context manager that restores the terminal, also on an exception or Ctrl-C.

    `total_steps` is the whole run's; `first_step` is the step that a resumed run continues after. Without `output`,
    standard output is taken. A quiet one, for ranks but the first, shows and logs nothing. Raises ConfigError when
    `run_dir/log.txt` cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        first_step: int = 0,
        output: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_quiet: bool = False,
    ) -> None:
        # an environment's FORCE_COLOR must not draw a bar into a pipe; a notebook gets plain lines
        is_terminal = sys.stdout is not None and sys.stdout.isatty() and not is_quiet
        self._output = output or _Output(force_terminal=is_terminal, force_jupyter=False, quiet=is_quiet)
        self._total = total_steps
        self._clock = clock
        self._last_line = (-math.inf, -math.inf)  # step and time
        self._losses: deque[float] = deque(maxlen=LOSSES)  # of the last steps
        self._step = first_step
        self._step_began = clock()
        self._micro_batch_times = (self._step_began, self._step_began)  # of the last drawing and of the last line
        self._interactive = self._output.is_terminal and not self._output.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.fields[at]}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}"),
            console=self._output,
            expand=True,
            disable=not self._interactive,
            get_time=clock,
            speed_estimate_period=SPEED_SECONDS,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=first_step, at=first_step, shown=_percent(first_step, total_steps)
        )
        self._log_path = Path(os.devnull) if is_quiet else run_dir / LOG_FILE
        try:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = open_appended(self._log_path) if not is_quiet else _open_nothing()
        except OSError as error:
            raise ConfigError(f"{self._log_path}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> "Console":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar, restore the cursor and close the log; again is no error."""
        with contextlib.suppress(OSError):  # of a terminal that is gone
            self._bar.stop()
        self._log.close()

    def print(self, text: str) -> None:
        """Show lines above the bar and write them, with the time, to the log. Control characters are escaped."""
        self._show(text)

    def event(self, text: str) -> None:
        """Like `print`, for what a user should not miss."""
        self._show(text, Style(color="yellow"))

    def log(self, text: str) -> None:
        """Write lines to the log alone."""
        self._write_log(_escape(text))

    def block(self, title: str, entries: Sequence[tuple[str, str]], is_event: bool = False) -> None:
        """Show what belongs together: a line `key  value` for each entry, wrapped at the width; as `event` if so."""
        keys = max(len(key) for key, _ in entries) + 2
        width = max(min(self._output.width, WIDEST_BLOCK) - 2 - keys, 16)
        lines = [title]
        for key, value in entries:
            parts = textwrap.wrap(_escape(value), width, replace_whitespace=False, break_on_hyphens=False) or [""]
            lines += [f"  {key if number == 0 else '':<{keys}}{part}" for number, part in enumerate(parts)]
        self._show("\n".join(lines), Style(color="yellow") if is_event else None)

    @contextmanager
    def waiting(self, text: str, after: float = A_WAIT) -> Iterator[None]:
        """Show the text if the block takes longer than `after` seconds."""
        with waiting(text, self.print, after):
            yield

    def micro_batch(self, number: int, of: int) -> None:
        """Move the bar within a step; without one, a line now and then if the step takes long."""
        now, (drawn, reported) = self._clock(), self._micro_batch_times
        if now - drawn < PER_DRAWING or number == of:
            return
        step = self._step + 1
        self._bar.update(self._task, completed=self._step + number / of)
        if not self._losses:
            self._bar.update(self._task, shown=f"{_percent(self._step, self._total)}  micro-batch {number}/{of}")
        every = LONG_STEP if reported == self._step_began else SECONDS_PER_LINE
        if now - reported >= every:
            reported = now
            line = f"step {step}: micro-batch {number} of {of}"
            if self._interactive:
                self._write_log(line)
            else:
                self._show(line)
        self._micro_batch_times = now, reported

    def step(self, step: int, loss: float, tokens_per_second: float, **further: float) -> None:
        """Move the bar. A plain line goes to the log, and to the output without a bar, now and then.

        The loss that is shown is the mean of the last steps; one that is no finite number is shown itself. Further
        numbers are shown behind it, each with its name.
        """
        if step <= self._step:  # the run was rolled back
            self._losses.clear()
        self._losses.append(loss)
        self._step = step
        shown_loss = "  ".join([_loss(self._losses), *(f"{name} {value:.4g}" for name, value in further.items())])
        percent = _percent(step, self._total)
        speed = f"{_short(tokens_per_second)} tok/s"
        self._bar.update(self._task, completed=step, at=step)
        left = self._time_left()
        self._bar.update(self._task, shown=f"{percent}  loss {shown_loss}  {speed}  {left} left")
        line_step, line_time = self._last_line
        now = self._clock()
        self._step_began, self._micro_batch_times = now, (now, now)
        due = step - line_step >= self._total / LINES_PER_RUN or now - line_time >= SECONDS_PER_LINE
        if due or step == self._total:
            self._last_line = (step, now)
            line = f"step {step}/{self._total} ({percent})  loss {shown_loss}  {speed}  {left} left"
            if self._interactive:
                self._write_log(line)
            else:
                self._show(line)

    def evaluation(self, step: int, loss: float, perplexity: float, best: bool) -> None:
        numbers = f"validation loss {_plain(loss, 4)}, perplexity {_plain(perplexity, 2)}"
        self._show(f"step {step}: {numbers}{' (best)' if best else ''}")

    def sources(self, names: Sequence[str], tokens: Sequence[int]) -> None:
        """Show what each source of a mixture has given so far."""
        shares = (
            f"{name} {_short(count)} ({count / max(sum(tokens), 1):.1%})"
            for name, count in zip(names, tokens, strict=True)
        )
        self._show(f"tokens so far: {', '.join(shares)}")

    def samples(self, samples: Sequence[tuple[str, str]]) -> None:
        """Show (prompt, continuation) pairs: the prompt's lines after `>`, in bold, the continuation's after `|`."""
        for prompt, continuation in samples:
            self._show("")
            self._show_marked("> ", prompt, Style(bold=True))
            self._show_marked("| ", continuation, Style.null())
        self._show("")

    def preview(self, samples: Sequence[tuple[str, str]]) -> None:
        """Show each (prompt, continuation) pair in one line, cut at the width."""
        for prompt, continuation in samples:
            line = Text(self._encodable(_escape("  " + _one_line(prompt + continuation))), Style(dim=True))
            line.truncate(self._output.width, overflow="ellipsis")
            self._print(line)
            self._write_log(line.plain)

    def _show(self, text: str, style: Style | None = None) -> None:
        text = _escape(text)
        self._print(Text(self._encodable(text), style or Style.null()))
        self._write_log(text)

    def _print(self, text: Text) -> None:
        """Print it; where the reader has gone or the disk is full, no more is printed, and the run goes on."""
        try:
            # soft wrapping leaves long lines whole for a pipe and to the terminal's own wrapping
            self._output.print(text, soft_wrap=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._write_log(f"the output cannot be written: {error.strerror}; from here on there is this log alone")

    def _show_marked(self, marker: str, text: str, style: Style) -> None:
        for line in _escape(text).split("\n"):
            parts = Text(self._encodable(line), style, no_wrap=False).wrap(
                self._output, max(self._output.width - len(marker), 1)
            )
            for part in parts or [Text("")]:
                self._print(Text(marker, Style(dim=True)) + part)
            self._write_log(marker + line)

    def _write_log(self, text: str) -> None:
        """Append it; what a full disk has no room for is shown alone."""
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        lines = "".join(f"{now} {line}".rstrip() + "\n" for line in text.split("\n"))
        try:
            self._log.write(lines.encode("utf-8", "backslashreplace"))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise RecordsFailed(f"{self._log_path}: cannot be written: {error.strerror}") from None

    def _time_left(self) -> str:
        seconds = self._bar.tasks[0].time_remaining
        if seconds is None:
            return "-:--"
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        if hours >= 100:
            return f"{hours // 24} days"
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def _encodable(self, text: str) -> str:
        return text.encode(self._output.encoding, "backslashreplace").decode(self._output.encoding)


def say(text: str) -> None:
    """Print a line where there is no run's console yet; an output that cannot be written is left to that."""
    if sys.stdout is not None:
        encoding = sys.stdout.encoding or "utf-8"  # a StringIO has none
        with contextlib.suppress(OSError):
            print(_escape(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextmanager
def waiting(text: str, report: Callable[[str], None], after: float = A_WAIT) -> Iterator[None]:
    """Report the text if the block takes longer than `after` seconds."""
    timer = threading.Timer(after, report, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _loss(losses: Sequence[float]) -> str:
    """The mean of the finite ones, unless the newest is not."""
    if not math.isfinite(losses[-1]):
        return f"{losses[-1]}"
    finite = [loss for loss in losses if math.isfinite(loss)]
    return _plain(sum(finite) / len(finite), 3)


def _plain(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if abs(number) < LARGEST_PLAIN else f"{number:.3g}"


def _open_nothing() -> BinaryIO:
    return open(os.devnull, "ab", buffering=0)


def _percent(step: int, total: int) -> str:
    """Rounded down: 100% is the end."""
    return f"{100 * step // total}%"


def _escape(text: str) -> str:
    """Text that cannot steer a terminal: newlines stay, tabs become spaces, what is not printed is spelt out."""
    return "".join(
        char if char == "\n" else TAB if char == "\t" else _spelt_out(char) for char in text.replace("\r\n", "\n")
    )


def _one_line(text: str) -> str:
    """Newlines and the indentation behind them as one sign."""
    return re.sub(r"\s*\n\s*", " ⏎ ", text)


def _spelt_out(char: str) -> str:
    if unicodedata.category(char) not in ESCAPED_CATEGORIES:
        return char
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def _short(count: float) -> str:
    for unit in ("", "k", "M"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"
