"""Runs whose fault the rules are known not to name, and why."""

_ROUNDED = "of the numbers that still move each moves by all of its rounding, so the updates have the usual size"
_TWICE = "the hash of a step's rows tells rows that come again in a later step, and not those that are in a step twice"

MISSED = {
    "positions-over-the-batch-across-rows-1": "made inside the model, and no probe puts a row into another batch size",
    "recompiled-after-steps-1-0": "PyTorch gives up at its limit of 8 in the first steps, which the rule leaves out",
    "bfloat16-weights-without-masters-0.0001-0": _ROUNDED,
    "bfloat16-weights-without-masters-0.0003-1": _ROUNDED,
    "eps-too-large-1-1": "named as a rate that is too low, which hides the size of the updates",
    "same-rows-on-all-ranks-on-0": _TWICE,
    "same-rows-on-all-ranks-on-1": _TWICE,
}
