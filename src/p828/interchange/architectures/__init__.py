"""The architectures of other libraries that p828 reads and writes, a table each, and its own with its code."""
