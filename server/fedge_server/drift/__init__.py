"""Whether devices see something else than before, told from their counts at a stated false-alarm rate."""
