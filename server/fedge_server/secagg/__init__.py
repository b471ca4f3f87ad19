"""Secure aggregation on the server: who shares masks with whom, and the sum that it may see."""
