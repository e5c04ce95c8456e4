"""The proof as a page: a row a run, and what it comes to."""

from collections.abc import Sequence

from cases import Fault, Healthy
from judge import FIRST, Verdict
from missed import FIRST_VERDICT, MISSED, MISSED_AT_FIRST

COMMAND = "python tests/health/proof.py DIRECTORY --write docs/health_proof.md"
WARNINGS_IN = 5  # healthy runs may one warning come

ABOUT = f"""\
# Proof of the rules

Each run trains a small real model on a CPU with one thing broken in p828's own code
(`tests/health/injections`), or with nothing broken. The rules of [health.md](health.md) read what the run
recorded: live, and afterwards from its directory. A fault is named if a rule for its cause is among the
first {FIRST} findings afterwards. *Live* is the step at which the run itself named it, and *from* the first
step that was broken.

`{COMMAND}` makes all runs that are not in
the directory yet, and writes this page. `make test-health` makes all of them, and fails where a run comes
out otherwise than here.

The second half of the faults was first tried once the thresholds of the rules were fixed. Who wrote it had
read the rules. Injections that broke nothing, or ended the run at once, were mended and tried again: the
causal mask (a CPU's kernel is causal without it), slow data (the machine was slower), and the masters.
The threshold of 12 for scaled gradients came after, with the first half's runs, and a false alarm of
`bias_not_balancing` was mended then: a bias that is back at zero does not stand still. Of the first half
some strengths were replaced after their first results: of one preferred expert (0.2 to 1.5 before), one bad
update (1 before) and noise in the updates (0.1 and 0.4 before).

After the first verdict of the second half the rules that had missed a fault were mended with these very
runs, so that what they see now is no proof of other runs. Both verdicts are here. The rows of the tables,
but for the first verdict, are those of one call of the command above with the rules as they are, 2 runs at a
time on 2 cores, with PyTorch 2.13.

The same call on 16 cores, 13 runs at a time with PyTorch 2.11 and another Python's library as text, came out
otherwise in three rows. Of *one expert is preferred* at 0.5 `router_collapse` was named, which hides
`load_imbalance`. `conversations` had a warning of `validation_leak`. `compiled` had a critical finding, and it
was right: with 2.11 the compiled attention of a CPU had no gradient, for its sinks or anything before it. That
is mended, and repeated with 2.11 `compiled` has no finding.

Three faults came last, each on a CPU and with two real processes where it needs them. Of *memory of rank 1*
and *slow loop* the thresholds are the old ones; that of *slow links* (half of a step) was set before the
first of its runs, by what makes one rank faster than two.

- *memory of rank 1*: after every step this process keeps memory in proportion to its busiest expert's load.
  The finding has to name the rank.
- *slow loop*: after each micro-batch the loop shows how far it is, and the terminal takes its time. A CPU is
  its own device, at work on the model in the engine's calls alone; of a GPU the same rule asks how long it
  was idle. A host that launches kernels too slowly needs a GPU and is not here.
- *slow links*: two processes over gloo, whose collective operations take as long as their bytes need at that
  rate. The kinds of links that `nvidia-smi` tells are tested with its output alone.

The healthy run `compiled` warned once of memory that grew. It did, by the test's own doing: graphs that are
run as Dynamo finds them leave, at each call of an autograd function, a class and its tensors in a reference
cycle, until Python collects it. Compiled by AOTAutograd, as in a real run, there are none, and memory stays.

The runs on a disk of their own are skipped, with a line, where mounting is not permitted.
"""


def page(
    first_half: Sequence[Verdict], second_half: Sequence[Verdict], later: Sequence[Verdict], healthy: Sequence[Verdict]
) -> str:
    """The whole of docs/health_proof.md."""
    return "\n".join([
        ABOUT,
        "| | runs | named | named live | |",
        "|---|---|---|---|---|",
        _summary("faults of the first half", first_half),
        f"| faults of the second half, first verdict | {FIRST_VERDICT} |",
        _summary("faults of the second half, rules mended", second_half),
        _summary("faults that came later", later),
        _healthy_summary(healthy),
        "",
        "## First half: faults that the thresholds were chosen with",
        "",
        *_rows(first_half),
        "",
        "## Second half: faults first tried once the thresholds were fixed",
        "",
        *_rows(second_half),
        "",
        "## Faults that came later",
        "",
        *_rows(later),
        "",
        "What is not named everywhere:" if MISSED else "None of them is missed now.",
        "",
        *(f"- `{name}`: {why}" for name, why in MISSED.items()),
        *([""] if MISSED else []),
        "What was missed at the first verdict, and what sees it now:",
        "",
        *(f"- `{name}`: {mended.why}. Now {mended.now}." for name, mended in MISSED_AT_FIRST.items()),
        "",
        "## Healthy runs",
        "",
        "| run | critical findings | warnings | notes |",
        "|---|---|---|---|",
        *map(_healthy_row, healthy),
        "",
    ])  # fmt: skip


def _summary(what: str, verdicts: Sequence[Verdict]) -> str:
    right = sum(verdict.is_right for verdict in verdicts)
    live = sum(verdict.found_live is not None for verdict in verdicts)
    faults = {verdict.run.case.name for verdict in verdicts}
    whole = {verdict.run.case.name for verdict in verdicts if not verdict.is_right}
    always = f"{len(faults) - len(whole)} of {len(faults)} faults are named at every strength and seed"
    return f"| {what} | {len(verdicts)} | {right} | {live} | {always} |"


def _healthy_summary(verdicts: Sequence[Verdict]) -> str:
    clean = sum(verdict.is_clean for verdict in verdicts)
    warned = sum(bool(verdict.warnings) for verdict in verdicts)
    return (
        f"| healthy | {len(verdicts)} | | | {len(verdicts) - clean} with a critical finding, {warned} with a warning |"
    )


def _rows(verdicts: Sequence[Verdict]) -> list[str]:
    head = [
        "| | fault | strength | seed | first two findings | named | from | live |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return head + [_row(verdict) for verdict in verdicts]


def _row(verdict: Verdict) -> str:
    run, case = verdict.run, verdict.run.case
    assert isinstance(case, Fault)
    found = ", ".join(f"`{finding.rule}`" for finding in verdict.afterwards[:FIRST]) or "none"
    named = "yes" if verdict.is_right else f"no: `{case.rules[0]}`"
    if run.name in MISSED_AT_FIRST:
        named += "; at first no"
    live = "" if verdict.found_live is None else str(verdict.found_live)
    return (
        f"| {case.number} | {case.name} | {run.shown_strength} | {run.seed} | {found} | {named} | "
        f"{case.strikes_at} | {live} |"
    )


def _healthy_row(verdict: Verdict) -> str:
    assert isinstance(verdict.run.case, Healthy)

    def of(severity: str) -> str:
        found = dict.fromkeys(f.rule for f in (*verdict.afterwards, *verdict.live) if f.severity == severity)
        return ", ".join(f"`{rule}`" for rule in found)

    return f"| {verdict.run.case.name} | {of('critical')} | {of('warning')} | {of('note')} |"
