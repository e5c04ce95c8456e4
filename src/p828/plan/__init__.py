"""What a run takes before it is started: memory, time, bytes over the links. From the configuration alone: no PyTorch.

Memory is derived and not measured: `tensors` says which parameters there are, `state` what an engine keeps of them,
`activations` what the layers keep for the backward pass and need on the way, and `peak` when in a step most of it is
there at once. docs/plan.md has the formulas, and how far a GPU's numbers are from them.
"""
