"""Aggregation that some clients cannot spoil: Flower's rules with a stage before them, and two of our own.

All of them need every update of the round at once. They read the updates a block of values at a time
(`updates`), so that updates that lie in files stay there.
"""

from __future__ import annotations

from fedge_server.strategies.robust.centred_clipping import CentredClipping
from fedge_server.strategies.robust.geometric_median import GeometricMedian
from fedge_server.strategies.robust.mixing import FedMedian, FedTrimmedAvg, Krum, MultiKrum

__all__ = ["RULES", "CentredClipping", "FedMedian", "FedTrimmedAvg", "GeometricMedian", "Krum", "MultiKrum"]

RULES = (CentredClipping, FedMedian, FedTrimmedAvg, GeometricMedian, Krum, MultiKrum)
