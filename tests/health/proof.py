"""Makes all runs of the proof and prints what the rules found in them.

python tests/health/proof.py DIRECTORY [--only WORDS] [--again] [--jobs N] [--write FILE]
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `runs`

from corpus import write_corpus
from proof_runs import ProofRun, proof_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="runs whose directory's name has these letters")
    parser.add_argument("--again", action="store_true", help="make runs again that are there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    given = parser.parse_args()
    directory = given.directory.absolute()
    corpus = write_corpus(directory / "corpus")
    wanted = [run for run in proof_runs() if given.only in run.name]

    def make(run: ProofRun) -> None:
        if given.again or not (directory / f"{run.name}.log").exists():
            run.make(corpus, directory)
        print(run.name, (directory / f"{run.name}.log").read_text().splitlines()[-1], flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(make, wanted))


if __name__ == "__main__":
    main()
