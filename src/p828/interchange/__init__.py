"""Models that leave and enter: other libraries' architectures, their files, and p828's checkpoints made of them."""
