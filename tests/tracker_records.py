"""Records that trackers are given."""

FINDING = {
    "rule": "divergence", "severity": "critical", "since": 1, "evidence": "12 at step 1", "cause": "the rate",
    "remedy": "a lower one", "reference": "a paper",
}  # fmt: skip
