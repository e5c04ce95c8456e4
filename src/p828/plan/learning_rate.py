"""AdamW's best learning rate by model size, as others have found it by sweeps.

OLMo-core's ladder of MoE models (github.com/allenai/OLMo-core, `src/scripts/train/jacobm_olmoe_ladder/LR_FITS.md`,
2026-06-12): 275, 480, 810 and 1,200 M parameters active, embeddings included, in steps of 262,144 tokens, 15 to 18
tokens for an active parameter. The best rates of their quadratic fits are 2.13e-3, 9.58e-4, 6.21e-4 and 4.83e-4. The
best rate falls as active to the power of about -1: 2e-3 for 275 M is within a fifth of all four. In runs of eight times
the tokens, in steps of three times, the best rates were 0.63 (275 M) and 0.75 (810 M) of these.
"""

REFERENCE_RATE, REFERENCE_ACTIVE = 2e-3, 275e6
FITTED = (275e6, 1200e6)
FITTED_TOKENS = 2**18  # of a step
FITTED_TOKENS_PER_ACTIVE = (15, 18)
LONGER = 2  # times as many tokens, from which on a run is told to want less: 0.84 of the rate at 275 M
LAW = f"{REFERENCE_RATE:g} for {REFERENCE_ACTIVE / 1e6:.0f} M active, falling as 1 / active"
RANGE = (
    f"{FITTED[0] / 1e6:,.0f} to {FITTED[1] / 1e6:,.0f} M active, {FITTED_TOKENS // 1024}k tokens a step and "
    f"{FITTED_TOKENS_PER_ACTIVE[0]} to {FITTED_TOKENS_PER_ACTIVE[1]} tokens for an active parameter"
)


def learning_rate(active: int) -> float:
    """For `active` parameters. A smaller model than were fitted gets the smallest one's rate: the law has no bound."""
    return REFERENCE_RATE * REFERENCE_ACTIVE / max(active, REFERENCE_ACTIVE)


def caveat(active: int, tokens_per_step: int, tokens: int) -> str:
    """What the fit does not say about a model of this size, in steps and a run of so many tokens; or nothing."""
    doubts = []
    if not FITTED[0] <= active <= FITTED[1]:
        doubts.append(f"this model has {active / 1e6:,.0f} M")
    if not FITTED_TOKENS / 2 <= tokens_per_step <= FITTED_TOKENS * 2:
        doubts.append(f"these steps have {tokens_per_step / 1024:,.0f}k")
    if tokens / active > LONGER * FITTED_TOKENS_PER_ACTIVE[1]:
        doubts.append(f"this run has {tokens / active:,.0f} for an active parameter, and longer runs want a lower rate")
    return "; ".join(doubts)
