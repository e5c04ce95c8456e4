"""AdamW's best learning rate by model size, as others have found it by sweeps.

OLMo-core's sweeps of MoE models (its ladder of 2026-06: 275 M and 810 M parameters active, 256k tokens a step):
2e-3 for 275 M active, falling as 1 / active. It is a fit to models of that range and of that batch, and no more.
"""

REFERENCE_RATE, REFERENCE_ACTIVE = 2e-3, 275e6
FITTED = (275e6, 810e6)
FITTED_TOKENS = 2**18  # of a step


def learning_rate(active: int) -> float:
    """For `active` parameters. A smaller model than were fitted gets the smallest one's rate: the law has no bound."""
    return REFERENCE_RATE * REFERENCE_ACTIVE / max(active, REFERENCE_ACTIVE)


def caveat(active: int, tokens: int) -> str:
    """What the fit does not say about a model of this size in steps of this many tokens; empty within its range."""
    doubts = []
    if not FITTED[0] <= active <= FITTED[1]:
        doubts.append(f"this one has {active / 1e6:,.0f} M")
    if not FITTED_TOKENS / 2 <= tokens <= FITTED_TOKENS * 2:
        doubts.append(f"these steps have {tokens / 1024:,.0f}k")
    return "; ".join(doubts)
