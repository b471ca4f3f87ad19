"""Secure aggregation: what both sides compute (Bonawitz et al. 2017; Bell et al. 2020)."""
