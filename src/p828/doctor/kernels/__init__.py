"""Self-tests of the kernels: each against plain math in float64 on the CPU, values and gradients, on small sizes.

A machine can be such that a kernel does not compile there, or computes something else: another generation of GPUs,
another version of Triton, a damaged card. A training run would only show it as a loss that does not fall. Shapes are
written as in `p828.model`.
"""
