"""The block of rows that all kernels over permuted tokens agree on."""

TILE = 128  # rows of an expert are padded to whole tiles of the products
