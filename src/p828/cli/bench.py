"""`p828 bench`: how fast this machine trains and generates."""

from p828.cli import bench_generate, bench_train
from p828.cli.flags import HELP
from p828.config.values import shown
from p828.errors import ConfigError, did_you_mean

COMMANDS = {"train": bench_train, "generate": bench_generate}
USAGE = "\n       ".join(command.USAGE for command in COMMANDS.values())


def run(arguments: list[str]) -> None:
    what, flags = (arguments[0], arguments[1:]) if arguments else ("", [])
    if what in HELP:
        print(f"usage: {USAGE}\n\n`p828 bench train --help` and `p828 bench generate --help` say more.")
        return
    if what not in COMMANDS:
        given_words = f"was given {shown(what)}{did_you_mean(what[:80], COMMANDS)}" if what else "the word is missing."
        raise ConfigError(
            f"bench times `train` or `generate`; {given_words} Usage: p828 bench {'|'.join(COMMANDS)} ..."
        )
    COMMANDS[what].run(flags)
