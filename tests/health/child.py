"""A process that trains with one thing broken. It is forked from a server that has imported PyTorch already."""

import os
import socket
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from all_faults import FAULTS
from cases import Fault, Healthy
from healthy import HEALTHY

import p828.train.build  # so that no child needs to
from p828.cli.main import dispatch

CASES: dict[str, Fault | Healthy] = {case.name: case for case in (*FAULTS, *HEALTHY)}
assert p828.train.build


def start(config: Path, name: str, strength: int | None, log: Path, ranks: int = 1) -> list[ForkServerProcess]:
    """`p828 train CONFIG` on so many ranks with the case's injection at work, or with a strength of None without it.

    `strength` is the number of one of the fault's. All that is printed is added to `log`.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["child"])
    processes = []
    port = _free_port() if ranks > 1 else 0
    for rank in range(ranks):
        arguments = (str(config), name, strength, str(log), rank, ranks, port)
        processes.append(context.Process(target=_train, args=arguments, daemon=True))  # ends with the proof
        processes[-1].start()
    return processes


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _train(config: str, name: str, strength: int | None, log: str, rank: int, ranks: int, port: int) -> None:
    if ranks > 1:  # as torchrun sets them
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.setsid()  # signals of the terminal end the proof, which ends its runs
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.chdir(Path(config).parent)
    torch.set_num_threads(1)
    case = CASES[name]
    arguments = ["train", config]
    if strength is None:
        sys.exit(dispatch(arguments))
    with case.inject(case.strengths[strength] if isinstance(case, Fault) else ""):
        sys.exit(dispatch(arguments))
