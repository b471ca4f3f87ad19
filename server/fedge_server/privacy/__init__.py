"""Differential privacy: what is added to a round, what it costs, and the ledger that keeps count."""
