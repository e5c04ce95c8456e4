"""The command `p828`: picks the subcommand and turns errors into exit codes."""

import importlib
import os
import sys
import threading
import time
from contextlib import nullcontext, redirect_stdout, suppress
from types import ModuleType
from typing import NoReturn

from p828.cli.output import escape_what_output_lacks, loading_pytorch, open_closed_streams
from p828.config.values import shown
from p828.distributed.launcher import Process, launched, tell_launcher
from p828.errors import INTERRUPTED, ConfigError, LocalRankError, P828Error, did_you_mean, reason, warn

COMMANDS = {
    "plan": "what a run takes before it starts: memory, time, links, and how best to train it",
    "train": "train a model; a run that has checkpoints goes on from the newest",
    "prepare": "tokenize a source once, into files that training reads",
    "generate": "continue prompts with a trained model",
    "serve": "answer over HTTP with a trained model, as OpenAI's API does",
    "import": "a model of other libraries as a run",
    "evaluate": "loss, perplexity and bits per byte of a trained model",
    "export": "a trained model as a directory that transformers and other libraries load",
    "runs": "the runs of a directory: how far they are and how well they go",
    "compare": "what differs between two runs: settings, data, losses",
    "batch": "the rows of a step of a run, and the documents that they are made of",
    "report": "pictures of runs, as one HTML page that needs no network",
    "prove-resume": "whether a run that is killed and resumed is the run that was not",
    "doctor": "check the machine and a configuration before a run, or find what went wrong in one",
    "bench": "how fast this machine trains, beside other libraries",
}
SHOWN_WITHIN = 2.0  # seconds that the others leave rank 0 to say what is wrong: a launcher ends all when one has ended
LONGEST_LINE = 1200  # characters of a message; what is longer holds a value that goes on and on


def main() -> None:
    """Exit code 0: done, or saved and ended when asked to; 1: what was at work failed or stopped; 2: wrong input; 130:
    Ctrl-C.
    """
    # DeepSpeed's launcher puts it before everything else; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    open_closed_streams()
    escape_what_output_lacks()
    nowhere = redirect_stdout(open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
    with nowhere if _place(arguments).rank else nullcontext():
        code = dispatch(arguments)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End with this exit code, at once after Ctrl-C, and whatever threads are left behind.

    A thread inside a library's call, as in a tokenizer's training that was broken off, would crash when it returns to
    an interpreter that is shutting down.
    """
    if code != INTERRUPTED and not any(thread.daemon for thread in threading.enumerate()):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(code)


def dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments == ["--version"]:
        from importlib.metadata import version  # takes long, and Ctrl-C is answered once this file is imported

        print(f"p828 {version('p828')}")
        return 0
    command, *rest = arguments
    try:
        for argument in arguments:
            _check_unicode(argument)
        if command not in COMMANDS:
            near = did_you_mean(command[:80], [*COMMANDS, "--help", "--version"])
            raise ConfigError(f"no command {shown(command)}{near} Commands: {', '.join(COMMANDS)}")
        _module(command).run(rest)
        sys.stdout.flush()
    except P828Error as error:
        if error.exit_code and _place(arguments).is_launched:
            tell_launcher(_cut(f"p828: {error}"))
        if isinstance(error, LocalRankError):
            warn(_cut(str(error)))
        else:
            _show(error, error.is_everywhere, _place(arguments))
        if isinstance(error, ConfigError) and _place(arguments).local_rank:
            time.sleep(SHOWN_WITHIN)
        return error.exit_code
    except KeyboardInterrupt:
        _show("interrupted", is_everywhere=True, process=_place(arguments))
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        _drop_output()
    except OSError as error:
        if not _is_output_lost():
            raise
        _drop_output()
        _show(f"the output cannot be written: {reason(error)}", is_everywhere=False, process=_place(arguments))
        return 1
    return 0


def _is_output_lost() -> bool:
    """Whether standard output cannot be written, as on a full disk; else it has an empty line more."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Point standard output elsewhere, so that its flush at exit does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _module(command: str) -> ModuleType:
    """The command's own; imported late, since many of them import PyTorch, which takes seconds."""
    with loading_pytorch():
        return importlib.import_module(f"p828.cli.{command.replace('-', '_')}")


def _check_unicode(argument: str) -> None:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{shown(argument)} is not valid Unicode text") from None


def _place(arguments: list[str]) -> Process:
    """This process among those that train one run; any other command is by itself, whatever the environment says."""
    return launched() if arguments[:1] == ["train"] else Process()


def _show(text: object, is_everywhere: bool, process: Process) -> None:
    """Print an error: once in all if every rank of the run ends with it, else once on each machine."""
    if (process.rank if is_everywhere else process.local_rank) == 0:
        warn(_cut(str(text)))


def _cut(text: str) -> str:
    """Lines that someone can read: of a longer one its beginning and end."""
    lines = text.split("\n")
    return "\n".join(
        line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 4 :]}"
        for line in lines
    )


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  p828 {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    more = "p828 COMMAND --help says more, p828 --version which version this is."
    return "\n".join(["Trains Mixture-of-Experts language models.", "", *lines, "", more])
