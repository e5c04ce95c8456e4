"""Makes all runs of the proof and prints what the rules found in them.

python tests/health/proof.py DIRECTORY [--only WORDS] [--again] [--jobs N] [--write FILE]
"""

import argparse
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from all_faults import FIRST_HALF, LATER
from cases import Fault
from corpus import write_corpus
from judge import FIRST, Verdict, judged
from proof_runs import FOUND, ProofRun, proof_runs
from table import page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="runs whose directory's name has these letters")
    parser.add_argument("--healthy", action="store_true", help="the healthy runs alone")
    parser.add_argument("--again", action="store_true", help="make runs again that are there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--write", type=Path, help="the page with the tables")
    given = parser.parse_args()
    wanted = [run for run in proof_runs() if given.only in run.name and (run.is_healthy or not given.healthy)]
    verdicts = prove(wanted, given.directory.absolute(), given.jobs, given.again)
    broken = [verdict for verdict in verdicts if isinstance(verdict.run.case, Fault)]
    if given.write:
        first, later = ([one for one in broken if one.run.case in half] for half in (FIRST_HALF, LATER))
        second = [verdict for verdict in broken if verdict not in first and verdict not in later]
        healthy = [verdict for verdict in verdicts if verdict not in broken]
        given.write.write_text(page(first, second, later, healthy))


def prove(wanted: list[ProofRun], directory: Path, jobs: int | None, again: bool = False) -> list[Verdict]:
    """Make the runs that are missing, and judge each; prints a line of each as it ends, or why it is skipped."""
    os.environ["OMP_NUM_THREADS"] = "1"  # several runs share the cores
    directory.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(directory / "corpus")

    def proved(run: ProofRun) -> Verdict | None:
        is_missing = again or not (directory / f"{run.name}.log").exists()
        if is_missing and run.cannot:
            print(f"skipped {run.name}: {run.cannot}\n", end="", flush=True)
            return None
        if is_missing:
            shutil.rmtree(directory / run.name, ignore_errors=True)
            for suffix in (".log", FOUND):
                (directory / f"{run.name}{suffix}").unlink(missing_ok=True)
            run.make(corpus, directory)
        verdict = judged(run, directory)
        print(f"{line(verdict)}\n", end="", flush=True)  # in one piece, as several threads print
        return verdict

    with ThreadPoolExecutor(jobs) as pool:
        return [verdict for verdict in pool.map(proved, wanted) if verdict is not None]


def line(verdict: Verdict) -> str:
    """A run in a line of the console."""
    if isinstance(verdict.run.case, Fault):
        found = ", ".join(finding.rule for finding in verdict.afterwards[:FIRST]) or "nothing"
        outcome = "named " if verdict.is_right else "MISSED"
        return f"{outcome} {verdict.run.name}: {found}; live at {verdict.found_live}"
    outcome = "clean " if verdict.is_clean and not verdict.warnings else "WARNED" if verdict.is_clean else "ALARM "
    found = ", ".join(f"{finding.rule} ({finding.severity})" for finding in verdict.afterwards)
    return f"{outcome} {verdict.run.name}: {found or 'nothing'}"


if __name__ == "__main__":
    main()
