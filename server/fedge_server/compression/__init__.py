"""The cloud makes the global model small: distil, prune, quantise, measure, and let only proven variants out.

Read `search` first: it composes the stages, each a function in a file of its own that never edits its input.
"""

from __future__ import annotations

from fedge_server.compression.candidates import TierOutcome, Trial, Variant
from fedge_server.compression.gate import GateReport, judge
from fedge_server.compression.possible import check_possible
from fedge_server.compression.search import compress

__all__ = ["GateReport", "TierOutcome", "Trial", "Variant", "check_possible", "compress", "judge"]
