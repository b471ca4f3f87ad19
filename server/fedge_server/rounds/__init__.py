"""Federated rounds: the loop over Flower's Strategy seam, its rules, and its record."""
