"""Recipes that are fixed beforehand, each with the time and the tier that the search has.

They are those of the literature that an engineer would take: int8 after training; channels or single weights
pruned by magnitude, then int8; a student of 33,000 weights in 8, 4, 2 and 1 bits.
"""

from __future__ import annotations

from typing import Any

STUDENT = "cnn-8-32"

RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"students": [], "prune": {"kinds": []}, "forms": ["int8"]},
    "channels 50 % + int8": {"students": [], "prune": {"ratios": [0.5]}, "forms": ["int8"]},
    "channels 75 % + int8": {"students": [], "prune": {"ratios": [0.75]}, "forms": ["int8"]},
    "weights 90 % + int8": {
        "students": [],
        "prune": {"kinds": ["unstructured"], "sparsities": [0.9]},
        "forms": ["int8"],
    },
    "weights 95 % + int8": {
        "students": [],
        "prune": {"kinds": ["unstructured"], "sparsities": [0.95]},
        "forms": ["int8"],
    },
    **{
        f"student of 33,000, {form}": {"students": [STUDENT], "prune": {"kinds": []}, "forms": [form]}
        for form in ("int8", "w4", "ternary", "binary")
    },
}
