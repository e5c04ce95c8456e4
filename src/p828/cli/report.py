"""`p828 report`: pictures of runs, as one HTML page."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from p828.cli.flags import BOOLEANS, parse_given
from p828.cli.run_name import run_named
from p828.config.rules import check_path
from p828.errors import ConfigError, warn
from p828.files import open_regular, write_atomic
from p828.report.page import page
from p828.report.run import ReportedRun
from p828.report.watch import ReportServer
from p828.train.log.console import waiting

USAGE = "p828 report RUN [RUN ...] [--out FILE.html | --watch [--port N]]"
DESCRIPTION = (
    f"{USAGE}\n\nMakes one HTML page of runs, which needs no network: findings, losses, gradients, speed, memory, "
    "loads of the experts, samples, settings. RUN is a run's directory or its name under runs/; several are overlaid. "
    "With --watch the page is served to this machine's browsers and follows runs that train."
)
MOST_RUNS = 12
DOCTYPE = b"<!doctype html>"
WITH_VALUE = ("--out", "--port")


@dataclass(frozen=True)
class Arguments:
    out: Annotated[str, tyro.conf.arg(metavar="FILE.html", help_behavior_hint="(default: RUN.html)")] = ""
    """The page to write; one that is there is replaced, and no other file."""
    watch: bool = False
    """Serve the page at 127.0.0.1 and follow the runs, until Ctrl-C."""
    port: int = 8280
    """Where to serve it; 0 takes a free port."""


def run(arguments: list[str]) -> None:
    names, flags = _split(arguments)
    given, set_flags = parse_given(Arguments, flags, prog="p828 report", default=Arguments(), description=DESCRIPTION)
    _check(given, set_flags, names)
    paths = [_directory(name) for name in names]
    out = Path(given.out or f"{paths[0].resolve().name}.html")
    if not given.watch:
        _check_out(out)
    runs = [ReportedRun(path, warn) for path in paths]
    for one in runs:
        if one.problem:
            warn(f"{one.path}: {one.problem}")
    if given.watch:
        _serve(runs, given.port)
    else:
        _write(runs, out)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The runs, and the flags with their values."""
    names: list[str] = []
    flags: list[str] = []
    for word in arguments:
        is_value = bool(flags) and (flags[-1] in WITH_VALUE or (flags[-1] == "--watch" and word in BOOLEANS))
        (flags if is_value or word.startswith("-") else names).append(word)
    return names, flags


def _check(given: Arguments, flags: dict[str, object], names: list[str]) -> None:
    if not 1 <= len(names) <= MOST_RUNS:
        what = f"{len(names)} runs are named, at most {MOST_RUNS} are accepted" if names else "no RUN is named"
        raise ConfigError(f"{what}. Usage: {USAGE}")
    if given.watch and "out" in flags:
        raise ConfigError("--out: accepted without --watch, which serves the page")
    if "port" in flags and not given.watch:
        raise ConfigError("--port: accepted with --watch")
    if not 0 <= given.port < 2**16:
        raise ConfigError(f"--port {given.port}: 0 to {2**16 - 1} is accepted")
    if "out" in flags:
        check_path("--out", given.out)


def _directory(name: str) -> Path:
    check_path("RUN", name)
    return run_named(name)


def _check_out(path: Path) -> None:
    """Refuse a place where no page can be written, before the records are read."""
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a directory; a file is accepted, as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: no such directory {path.parent}")
    if path.exists() and not _is_page(path):
        raise ConfigError(f"--out {path}: exists and is no HTML page; only a page is replaced")


def _write(runs: list[ReportedRun], path: Path) -> None:
    with waiting(f"making {path}", warn):
        text = "".join(page(runs))
    try:
        write_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error.strerror}") from None
    print(f"{path} ({len(text) / 1e6:.1f} MB): open it in a browser")


def _is_page(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(DOCTYPE)).lower() == DOCTYPE
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be replaced: {error.strerror}") from None


def _serve(runs: list[ReportedRun], port: int) -> None:
    with ReportServer(runs, port) as server:
        print(f"{server.url} follows {', '.join(str(run.path) for run in runs)}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
