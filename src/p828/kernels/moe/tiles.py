"""The tiles that all kernels over sorted rows agree on."""

TILE = 128  # rows of an expert are padded to whole tiles of the products
