"""Rules about the data: batches that come again, token ids, and what validation rows were trained on."""

from p828.health.finding import Finding
from p828.health.window import Window, number_of

REPEATED_EPOCHS = 4  # Muennighoff et al. 2023 (arXiv 2305.16264): up to 4 epochs are nearly worth fresh data
REPEATED_SHARE = 0.1  # of a step's rows; two ranks of eight that read the same make an eighth
REPEATED_STEPS = 8  # in a row: copies of a document that come together by chance do not go on
EPOCHS_REFERENCE = "Muennighoff et al. 2023 (arXiv 2305.16264): up to 4 epochs are nearly as good as fresh data"


def repeats(window: Window) -> list[Finding]:
    """Steps in a row whose rows were those of earlier steps of the same epoch."""
    found = window.repeats
    if found.first is None or found.newest is None:
        return []
    (since, before), (last, last_before) = found.first, found.newest
    resumed = window.resumed_at
    how = f"; the run was resumed from step {resumed}" if resumed is not None and since > resumed else ""
    return [
        Finding(
            "data_repeats",
            "critical",
            window.step,
            since,
            f"{found.steps} steps had exactly the rows of earlier steps of the same epoch: step {since} those of step "
            f"{before}, up to step {last} with those of step {last_before}{how}",
            "the data began again where it should have gone on, or one batch is handed out again and again",
            f"compare p828 batch {window.facts.run} --step {since} and --step {before}; resume from a checkpoint "
            f"before step {since}",
            "within an epoch a row comes once; the hash of a step's rows has 32 bits, so two equal ones in a row are "
            "no chance",
        )
    ]


def repeats_within(window: Window) -> list[Finding]:
    """Rows that are in a step more than once, step after step."""
    shares = [number_of(record, "repeated_rows") or 0.0 for record in window.last(REPEATED_STEPS)]
    if len(shares) < REPEATED_STEPS or min(shares) < REPEATED_SHARE:
        return []
    return [
        Finding(
            "data_repeats",
            "critical",
            window.step,
            window.step - REPEATED_STEPS + 1,
            f"{min(shares):.0%} to {max(shares):.0%} of the rows of a step are in it already, in each of the last "
            f"{REPEATED_STEPS} steps",
            "ranks or micro-batches are given the same rows, where each should have its own",
            "see that each rank reads its own part of the data: p828 batch "
            f"{window.facts.run} --step {window.step} shows the rows; or remove copies (prepare.drop_duplicates)",
            "within an epoch a row comes once; a row that is twice in a step counts twice in its gradient",
        )
    ]


def epochs(window: Window) -> list[Finding]:
    """More epochs than repeated data is worth."""
    epoch = number_of(window.recent[-1], "epoch") if window.recent else None
    if epoch is None or epoch < REPEATED_EPOCHS:
        return []
    return [
        Finding(
            "data_repeats",
            "note",
            window.step,
            window.step,
            f"the run is in epoch {epoch + 1:.0f} of its data",
            "the run is longer than its data",
            "more data, or fewer steps: past 4 epochs a token is worth less and less",
            EPOCHS_REFERENCE,
        )
    ]


def token_ids(window: Window) -> list[Finding]:
    """Token ids that the model has no row for."""
    vocabulary = window.facts.vocab_size
    for record in window.recent:
        token = number_of(record, "max_token")
        if vocabulary and token is not None and token >= vocabulary:
            return [
                Finding(
                    "token_out_of_vocabulary",
                    "critical",
                    window.step,
                    record["step"],
                    f"step {record['step']} has the token id {token:.0f}, and the model has rows for ids up to "
                    f"{vocabulary - 1}",
                    "the data was prepared with another tokenizer than the model was made for",
                    "prepare the data again with the run's tokenizer, or give the run the data's",
                    "an id at or above model.vocab_size has no row in the embedding",
                )
            ]
    return []
