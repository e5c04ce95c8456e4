"""The command `p828`, from its first moment on: Ctrl-C while it is being imported is answered with a line, too."""

import os
import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main() -> None:
    try:
        from p828.cli.main import main as run

        run()
    except KeyboardInterrupt:  # `run` answers those that come while a command is at work
        print("p828: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
