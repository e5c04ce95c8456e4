"""The watchdog: it notices that a rank of the run has died or hangs, and ends the other ranks.

A rank that waits for a dead one in a collective operation notices late or never, and then every rank prints a
traceback. So each rank keeps a connection to rank 0. The system closes the connection when a process ends, however it
ends. Rank 0 then names the dead rank in one line and ends the others. When no rank has made progress for the time-out,
rank 0 first collects the stacks of all ranks.

A thread watches the connections, since the main thread may be inside a collective operation.
"""

import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from p828.distributed.connections import Peer, connect
from p828.distributed.stacks import main_thread, stacks
from p828.errors import INTERRUPTED, P828Error
from p828.files import open_appended, write_atomic
from p828.runs.file_names import HANG_FILE

LOOK_EVERY = 0.5  # seconds
ANSWER_WITHIN = 15.0  # seconds for a rank to send its stacks
LOSS_NOTICED_WITHIN = 3.0  # seconds within which the watchdog notices a death that made a collective operation fail


def connect_watchdog(
    rank: int, size: int, all_gather_object: Callable[[Any], list[Any]], timeout: float, run_dir: Path
) -> "Watchdog":
    """Start this rank's watchdog; all ranks must call it.

    Args:
        all_gather_object: returns every rank's value, by rank.
        timeout: seconds without progress after which the run is ended.

    Raises RunFailed where a rank cannot be reached.
    """
    peers = connect(rank, size, all_gather_object)
    process: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    processes: dict[int, dict[str, Any]] = dict(enumerate(all_gather_object(process)))
    return Watchdog(rank, peers, processes, timeout, run_dir / HANG_FILE)


class Watchdog:
    """One rank's watchdog. On rank 0 it has a connection to every other rank, elsewhere one to rank 0."""

    def __init__(
        self, rank: int, peers: list[Peer], processes: dict[int, dict[str, Any]], timeout: float, report: Path
    ) -> None:
        self.rank, self.peers, self.processes, self.timeout, self.report = rank, peers, processes, timeout, report
        self._last_progress = time.monotonic()
        self._has_failed = self._has_reported = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch_or_abort, name="p828-watchdog", daemon=True)
        self._thread.start()

    def progressed(self) -> None:
        """Count the time-out from now on."""
        self._last_progress, self._has_reported = time.monotonic(), False

    def failed(self, error: BaseException) -> int | None:
        """Have rank 0 print why this rank fails.

        On rank 0, which prints it now and ends the other ranks, returns the exit code to end with. Elsewhere returns
        None, and marks an error that rank 0 prints as one that need not be shown again (`is_everywhere`).
        """
        is_ours = isinstance(error, P828Error)
        if not is_ours and not isinstance(error, KeyboardInterrupt):
            # Perhaps a collective operation failed as another rank died. Then the thread ends this process meanwhile.
            self._thread.join(LOSS_NOTICED_WITHIN)
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        if self.rank:
            text = str(error) if is_ours else "".join(traceback.format_exception_only(error)).strip()
            self.peers[0].send(failed=text, code=code)
            self._has_failed = True
            error.is_everywhere = is_ours or code == INTERRUPTED  # type: ignore[attr-defined]
            return None
        # Print before the other ranks end: a launcher that sees one of them end may end this process, too.
        if is_ours or code == INTERRUPTED:
            _print(f"p828: {error if is_ours else 'interrupted'}")
        else:
            _print("".join(traceback.format_exception(error)).rstrip())
            _print(f"p828: {self._process_of(0)} failed: {type(error).__name__}: {error}")
        self._end_others(code)
        return code

    def close(self) -> None:
        """Stop watching. Unless this rank has failed, it first sends the others a `bye`."""
        self._closing.set()
        for peer in self.peers:
            if not self._has_failed:
                peer.send(bye=True)
        self._thread.join()
        for peer in self.peers:
            peer.connection.close()

    def _watch_or_abort(self) -> None:
        """Any failure of the watchdog itself is shown and ends the run, which could hang for ever without it."""
        try:
            self._watch()
        except BaseException:
            _print(traceback.format_exc().rstrip())
            _print(f"p828: the watcher of {self._process_of(self.rank)} failed; the run ends")
            self._end_others()
            _exit(1)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self._closing.is_set():
                for key, _ in selector.select(LOOK_EVERY):
                    peer = key.data
                    for message in peer.receive():
                        self._on_message(peer, message)
                    if peer.is_closed:
                        selector.unregister(peer.connection)
                        if not peer.has_left and not self._closing.is_set():
                            self._on_peer_lost(peer)
                is_over = self._closing.is_set() or all(peer.has_left for peer in self.peers)
                if time.monotonic() - self._last_progress > self.timeout and not is_over:
                    if self.rank == 0:
                        self._report_hang(selector)
                    elif self._has_reported:
                        self._abort()
                    else:
                        self._report_to_rank_0()

    def _on_message(self, peer: Peer, message: dict[str, Any]) -> None:
        """Note or do what a rank sent; `end` and `write_stack` come from rank 0."""
        if "bye" in message:
            peer.has_left = True
        elif "failed" in message:
            peer.reason, peer.code = message["failed"], message["code"]
        elif "stack" in message:
            peer.stack = message["stack"]
        elif "hangs" in message:
            self._last_progress = -self.timeout
        elif "write_stack" in message:
            peer.send(stack=stacks())
        elif "end" in message:
            _exit(message["end"])

    def _on_peer_lost(self, peer: Peer) -> None:
        """A rank's connection closed before the rank sent `bye`: one rank names it, and all end."""
        who = self._process_of(peer.rank)
        if peer.code == INTERRUPTED:
            text = "interrupted"
        elif peer.reason:
            text = f"{who} failed: {peer.reason}"
        else:
            text = f"{who} died; the run ends. The same command goes on from the last checkpoint"
        if self.rank == 0 or (self.rank == 1 and peer.rank == 0):
            _print(f"p828: {text}")
        self._end_others(peer.code)
        _exit(peer.code)

    def _process_of(self, rank: int) -> str:
        return f"rank {rank} ({self.processes[rank]['host']}, process {self.processes[rank]['pid']})"

    def _end_others(self, code: int = 1) -> None:
        for peer in self.peers:
            if self.rank == 0 and not peer.is_closed:
                peer.send(end=code)

    def _report_to_rank_0(self) -> None:
        """Ask rank 0 to collect the stacks and end the run, and give it time for that."""
        self.peers[0].send(hangs=True)
        self._has_reported, self._last_progress = True, time.monotonic() + 2 * ANSWER_WITHIN - self.timeout

    def _abort(self) -> None:
        """End without rank 0, all of whose threads hang. Each rank appends its own stacks to the report."""
        stack = stacks()
        where = self._write_report(stack, is_whole=False)
        # A launcher ends all ranks once one has ended: first every rank writes, then rank 1 prints and ends.
        time.sleep(2 * LOOK_EVERY if self.rank == 1 else ANSWER_WITHIN)
        if self.rank == 1:
            _print(
                f"p828: no progress for {self.timeout:g} s, and no answer from {self._process_of(0)}; the run ends. "
                f"Where the others are: {where}\n  rank 1: {main_thread(stack)}"
            )
        _exit(1)

    def _report_hang(self, selector: selectors.BaseSelector) -> None:
        """Write the stacks of every rank to the report, print where each main thread is, and end the run."""
        for peer in self.peers:
            peer.send(write_stack=True)
        found, until = {0: stacks()}, time.monotonic() + ANSWER_WITHIN
        while len(found) <= len(self.peers) and time.monotonic() < until:
            for key, _ in selector.select(LOOK_EVERY):
                for message in key.data.receive():
                    self._on_message(key.data, message)
                if key.data.is_closed:
                    selector.unregister(key.data.connection)
            found |= {peer.rank: peer.stack for peer in self.peers if peer.stack}
        lines = [
            f"  rank {rank}: {main_thread(found[rank]) if rank in found else 'no answer'}"
            for rank in range(len(self.peers) + 1)
        ]
        whole = "\n\n".join(f"rank {rank}\n{text}" for rank, text in sorted(found.items()))
        summary = f"no progress for {self.timeout:g} s; the run ends. Where each rank is"
        where = self._write_report("\n".join([f"{summary}:", *lines]) + "\n\n" + whole, is_whole=True)
        _print("\n".join([f"p828: {summary} (whole stacks: {where}):", *lines]))
        self._end_others()
        _exit(1)

    def _write_report(self, text: str, is_whole: bool) -> str:
        """Write the whole report, or append this rank's part. Returns its path, or why it cannot be written."""
        try:
            if is_whole:
                write_atomic(self.report, text + "\n")
            else:
                with open_appended(self.report) as file:
                    file.write(f"rank {self.rank}\n{text}\n\n".encode())
        except OSError as error:
            return f"{self.report} cannot be written: {error.strerror or error}"
        return str(self.report)


def _print(text: str) -> None:
    """Print to standard error, if it is still open."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """End the process from this thread, wherever its main thread is."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where nobody reads the output
        os._exit(code)
