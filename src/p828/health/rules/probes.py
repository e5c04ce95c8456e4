"""Rules about what the run tries out on its own model: leaks of attention, evaluation, and the recorded loss."""

import math

from p828.health.finding import Finding, Severity
from p828.health.window import Record, Window, number_of

# Largest change of a log-probability that arithmetic explains: float32 sums in another order, or a bfloat16 logit.
LEAK = {"float32": 1e-3, "bfloat16": 0.1}
LEAKS = {
    "future_leak": (
        "earlier positions change by {change:.3g} when later tokens are changed",
        "attention is not causal: the mask is lost, or one is shifted",
    ),
    "document_leak": (
        "a document changes by {change:.3g} when the document before it in the row is changed",
        "documents of a row see each other although model.mask_documents is true",
    ),
    "row_leak": (
        "a row changes by {change:.3g} when it is another row of the batch",
        "rows depend on their place: positions are counted over batch × sequence, or rows see each other",
    ),
    "batch_leak": (
        "a row change by {change:.3g} in the median when it is a batch of its own",
        "rows depend on how many rows the batch has: positions are counted over batch × sequence, or rows see each "
        "other",
    ),
}
LEAK_REFERENCE = "Project 828, run 1: positions for (batch × sequence) cost 240,000 steps; a causal model's change is 0"

# Between the recorded loss and the same micro-batches evaluated, relative; dropout draws another mask.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-3}
DROPOUT_TOLERANCE = 0.15
RANDOM_TOLERANCE = 0.05  # where the same rows evaluated twice give two losses
INITIAL_OFF = 0.35  # of ln(vocabulary): the loss of drawn weights is close to that of equal shares for all tokens
LOSS_REFERENCE = (
    "Hugging Face, 2024, 'Fixing gradient accumulation': the loss is the sum over all targets of the step, divided by "
    "their number once"
)

OVERLAP = 0.1  # share of the validation rows; boilerplate makes a few percent of short rows of code known
CRITICAL_OVERLAP = 0.3
LEAKED_EVALUATIONS = 3  # in a row
LEAKED_GAP = 0.5  # nats by which a validation loss is under the training loss, without dropout
DETERMINISTIC = 1e-6  # nats between two evaluations of the same rows by the same weights


def attention(window: Window) -> list[Finding]:
    """Positions that see what they must not see."""
    tolerance = LEAK["bfloat16" if window.is_bfloat16 else "float32"]
    # what differs from pass to pass by itself, or is far off already, says nothing of leaks
    sound = [probe for probe in window.probes if _size(probe, "evaluation_difference") <= DETERMINISTIC]
    wrong = [probe for probe in window.probes if _size(probe, "position_error") > 0]
    if wrong:
        return [_positions(window, wrong)]
    for name, (what, cause) in LEAKS.items():
        found = [(probe, change) for probe in sound if (change := _size(probe, name)) > tolerance]
        if found:
            probe, change = max(found, key=lambda item: item[1])
            evidence = (
                f"log-probabilities of {what.format(change=change)} (step {probe['step']}; up to {tolerance:g} is "
            )
            return [
                Finding(
                    "attention_leak",
                    "critical",
                    window.step,
                    found[0][0]["step"],
                    evidence + "rounding)",
                    cause,
                    "mend it and begin again: what was trained so far has learned from what it will not see; "
                    'model.attention_backend = "reference" is plain code to compare with',
                    LEAK_REFERENCE,
                )
            ]
    return []


def _positions(window: Window, wrong: list[Record]) -> Finding:
    return Finding(
        "attention_leak",
        "critical",
        window.step,
        wrong[0]["step"],
        f"positions are up to {wrong[-1]['position_error']} off their token's place in its row or document (step "
        f"{wrong[-1]['step']})",
        "positions are counted over batch × sequence, or run on from row to row or from document to document",
        "count them from each row's or document's begin; what was trained so far has learned other positions",
        LEAK_REFERENCE,
    )


def _size(probe: Record, name: str) -> float:
    """How large the number is; 0 if it is missing, or not finite as all numbers of a model that is lost."""
    return abs(number_of(probe, name) or 0.0)


def loss_normalisation(window: Window) -> list[Finding]:
    """The recorded loss is not that of the step's micro-batches."""
    facts = window.facts
    usual = DROPOUT_TOLERANCE if facts.dropout else LOSS_TOLERANCE["bfloat16" if window.is_bfloat16 else "float32"]
    losses = {record["step"]: number_of(record, "loss") for record in (*window.first, *window.recent)}
    for probe in window.probes:
        is_sound = _size(probe, "evaluation_difference") <= DETERMINISTIC
        tolerance = usual if is_sound else max(usual, RANDOM_TOLERANCE)
        difference, loss = number_of(probe, "loss_difference"), losses.get(probe["step"])
        if difference is None or not loss or abs(difference) <= tolerance * abs(loss):
            continue
        other = loss - difference
        times = f", {loss / other:.3g} times it" if other > 0 else ""
        return [
            _normalised(
                window,
                probe["step"],
                f"step {probe['step']} recorded a loss of {loss:.4f}, and its "
                f"{facts.gradient_accumulation} micro-batches "
                f"evaluated give {other:.4f}{times}",
            )
        ]
    return _initial_loss(window)


def _initial_loss(window: Window) -> list[Finding]:
    """The first step's loss is far from that of guessing, though the weights were drawn."""
    facts = window.facts
    first = window.first[0] if window.first else {}
    loss = number_of(first, "loss")
    if loss is None or first["step"] != 1 or not facts.is_from_scratch or facts.vocab_size < 2:
        return []
    guessing = math.log(facts.vocab_size)
    if abs(loss - guessing) <= INITIAL_OFF * guessing:
        return []
    return [
        _normalised(
            window,
            1,
            f"the first step's loss is {loss:.3f}, {loss / guessing:.2f} times the {guessing:.3f} of equal shares for "
            f"all {facts.vocab_size:,} tokens; gradient_accumulation is {facts.gradient_accumulation}",
        )
    ]


def _normalised(window: Window, step: int, evidence: str) -> Finding:
    return Finding(
        "loss_normalisation",
        "critical",
        window.step,
        step,
        evidence,
        "micro-batches are averaged one by one, or summed without dividing by the step's targets on all ranks",
        "divide each micro-batch's sum of losses by the targets of the whole step, on all ranks",
        LOSS_REFERENCE,
    )


def validation(window: Window) -> list[Finding]:
    """Validation rows that were trained on."""
    found = [(probe, share) for probe in window.probes if (share := _size(probe, "validation_overlap")) >= OVERLAP]
    if found:
        probe, share = max(found, key=lambda item: item[1])
        severity: Severity = "critical" if share >= CRITICAL_OVERLAP else "warning"
        what = f"{share:.1%} of the validation rows were trained on, up to step {probe['step']}"
        return [_leaked(window, severity, found[0][0]["step"], what)]
    return _too_good(window)


def _too_good(window: Window) -> list[Finding]:
    """A validation loss far under that of the training steps before, several times in a row."""
    gaps = list(window.gaps)[-LEAKED_EVALUATIONS:]
    if window.facts.dropout or len(gaps) < LEAKED_EVALUATIONS or len(window.facts.mixture_steps) > 1:
        return []
    gap = min(gap.latest - gap.validation for gap in gaps)
    if gap < LEAKED_GAP:
        return []
    what = (
        f"the validation loss of step {gaps[-1].step} is {gaps[-1].validation:.3f}, and at {len(gaps)} evaluations it "
        f"was at least {gap:.2f} nats under the training loss of the steps before"
    )
    return [_leaked(window, "warning", gaps[0].step, what)]


def _leaked(window: Window, severity: Severity, since: int, what: str) -> Finding:
    return Finding(
        "validation_leak",
        severity,
        window.step,
        since,
        what,
        "the validation text is in the training data: the same files, copies of documents, or the held-out part again",
        "hold it out by document and remove copies (prepare.drop_duplicates), then begin again",
        "Lee et al. 2022 (arXiv 2107.06499): text that is in both sets makes the validation loss too low",
    )


def evaluation(window: Window) -> list[Finding]:
    """The same rows evaluated twice give two losses."""
    found = [
        (probe, size) for probe in window.probes if (size := _size(probe, "evaluation_difference")) > DETERMINISTIC
    ]
    if not found:
        return []
    probe, size = max(found, key=lambda item: item[1])
    dropout = window.facts.dropout
    return [
        Finding(
            "evaluation_not_deterministic",
            "critical",
            window.step,
            found[0][0]["step"],
            f"the same batch evaluated twice gives losses {size:.3g} apart at step {probe['step']}",
            f"dropout ({dropout:g}) is on in evaluation"
            if dropout
            else "evaluation draws at random, or changes the model",
            "evaluate in evaluation mode: model.eval(), and back afterwards",
            "an evaluation is a function of weights and rows; p828's kernels repeat bit for bit",
        )
    ]
