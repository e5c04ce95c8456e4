"""Speed of a training step, beside other trainers of the same sizes; each system is timed in a process of its own."""
