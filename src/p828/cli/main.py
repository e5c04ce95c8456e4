"""The command `p828`: picks the subcommand and turns errors into exit codes."""

import importlib
import os
import sys
from contextlib import nullcontext, redirect_stdout

from p828.errors import OneRanksError, RunPaused, RunStopped, UserError, nearest

COMMANDS = {
    "train": "train a model; a run that has checkpoints goes on from the newest",
    "prepare": "tokenize a source once, into files that training reads",
    "generate": "continue prompts with a trained model",
    "evaluate": "loss, perplexity and bits per byte of a trained model",
    "prove-resume": "whether a run that is killed and resumed is the run that was not",
    "bench": "how fast this machine trains, beside other libraries",
}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main() -> None:
    """Exit code 0: done, or saved and ended when asked to; 1: ended by its own guard; 2: wrong input; 130: Ctrl-C."""
    # DeepSpeed's launcher puts it before everything else; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    with nullcontext() if _rank() == "0" else redirect_stdout(open(os.devnull, "w")):
        code = dispatch(arguments)
    sys.exit(code)


def dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UserError(f"no command {command!r}{nearest(command, COMMANDS)} Commands: {', '.join(COMMANDS)}")
        # Imported here, since most commands import torch, which takes seconds.
        importlib.import_module(f"p828.cli.{command.replace('-', '_')}").run(rest)
    except (UserError, RunStopped) as error:
        if isinstance(error, OneRanksError):
            print(f"p828: {error}", file=sys.stderr)
        else:
            _tell(error, error.is_everywhere)
        return 2 if isinstance(error, UserError) else 1
    except RunPaused as paused:
        _tell(paused, paused.is_everywhere)
    except KeyboardInterrupt:
        _tell("interrupted", is_everywhere=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; point stdout elsewhere so that its flush at exit does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _tell(text: object, is_everywhere: bool) -> None:
    """Print it, but of many processes that train one run and end with the same, once on each machine or once in all."""
    if _rank("RANK" if is_everywhere else "LOCAL_RANK") == "0":
        print(f"p828: {text}", file=sys.stderr)


def _rank(variable: str = "RANK") -> str:
    """This process's number as its launcher gave it."""
    return os.environ.get(variable, "0")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  p828 {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["Trains Mixture-of-Experts language models.", "", *lines, "", "p828 COMMAND --help says more."])
