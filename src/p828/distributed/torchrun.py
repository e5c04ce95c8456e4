"""`python -m p828.distributed.torchrun`: torchrun that passes signals on to the ranks and waits until they have saved.

torchrun itself kills the ranks half a minute after Ctrl-C or SIGTERM, saved or not, and ends with a traceback. Here the
ranks get the signal and end by themselves. The exit code is that of the first rank that failed.

With `--max-restarts` torchrun gives ranks that it starts again the store of those before them, where gloo and NCCL find
the addresses of processes that are gone (PyTorch 2.13). Here they get a new one, unless --rdzv-backend is static.
"""

import inspect
import os
import signal
import sys
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from p828.distributed.launcher import OWN_STORE

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        if not ranks and not (passed_on and number == signal.SIGHUP):  # a terminal and its shell may both send it
            sys.exit(128 + number)
        passed_on.append(number)
        _send(number, ranks)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    if run.parse_args(sys.argv[1:]).max_restarts:
        os.environ.setdefault(OWN_STORE, "1")
    try:
        # torchrun would put handlers of its own in place of these. Unwrapped, it reports no error of a rank again.
        inspect.unwrap(run.main)(["--signals-to-handle", "SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        sys.exit(code if code > 0 else 128 - code)  # as shells report a signal


def _send(number: int, ranks: list[psutil.Process]) -> None:
    """Send the signal to every rank: a rank is in a session of its own, which a terminal's signals do not reach."""
    for rank in ranks:
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            continue  # it has ended


if __name__ == "__main__":
    main()
