"""What an honest but curious server gets out of updates: attacks to try on a task of your own.

`victims` lets fedge's real client train and hands over its update, `views` makes of it what a server sees
under a protection, `inversion` reconstructs training data from that, and `scores` says how well.
"""

from __future__ import annotations

from fedge_simulations.attacks.inversion import Matching, analytic, candidates, inferred_label, matching
from fedge_simulations.attacks.scores import correlation, psnr
from fedge_simulations.attacks.victims import Federation

__all__ = [
    "Federation",
    "Matching",
    "analytic",
    "candidates",
    "correlation",
    "inferred_label",
    "matching",
    "psnr",
]
