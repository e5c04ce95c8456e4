"""Text to batches: source, tokenizer, packing, loader; each stage an iterator whose position can be saved."""
