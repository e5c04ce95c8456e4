"""Tasks that a model is measured by: p828's own, which need nothing else, and those of lm-eval."""
