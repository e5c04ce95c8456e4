"""Pictures of runs: one HTML page that needs no network, made from their records. Nothing here imports PyTorch."""
