"""Which requests a device answers itself, and which the cloud: rules, and thresholds with a guarantee."""

from __future__ import annotations

from fedge.routing.calibration import Calibrated, for_accuracy, for_gap, for_share
from fedge.routing.carried import KEY, Routing, Wanted, calibrated
from fedge.routing.rules import CLOUD_ONLY, DEVICE_ONLY, DOUBTS, Doubt, Rule, chosen

__all__ = [
    "CLOUD_ONLY",
    "DEVICE_ONLY",
    "DOUBTS",
    "KEY",
    "Calibrated",
    "Doubt",
    "Routing",
    "Rule",
    "Wanted",
    "calibrated",
    "chosen",
    "for_accuracy",
    "for_gap",
    "for_share",
]
