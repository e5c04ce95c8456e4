"""Continue token ids in slots of one cache."""
