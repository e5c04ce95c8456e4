"""`p828 train` in this process with one thing broken: python child.py CONFIG FAULT STRENGTH [FLAG ...].

STRENGTH is the strength's number among those of the fault; FAULT is the name of a fault or of a healthy run.
"""

import sys

from all_faults import FAULTS
from cases import Fault, Healthy
from healthy import HEALTHY

from p828.cli.main import dispatch


def main(config: str, name: str, strength: str, *flags: str) -> int:
    case: Fault | Healthy = next(case for case in (*FAULTS, *HEALTHY) if case.name == name)
    value = case.strengths[int(strength)] if isinstance(case, Fault) else "on"
    with case.inject(value):
        return dispatch(["train", config, *flags])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
