"""Get onto a device what it may run, and nothing else, whatever fails on the way.

trust       which files are to be trusted: metadata of The Update Framework, over any transport
releases    what a tier is offered, by the metadata of fedge's repositories
installer   an artefact that verified metadata names, into the slot that does not run, and its trial
patching    the installed bytes out of those that run, where that is shorter
store       what is committed, and how it is opened
health      the trial of a model
streams     reading from any transport: bounded, held to a pace

A part is loaded when it is first asked for: a device that only answers needs `store`, and neither the TUF
library nor onnxruntime for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fedge_client.updater.health import Check, anything, model_check
    from fedge_client.updater.installer import Artefact, Expand, Installer, Patch
    from fedge_client.updater.releases import Offered, golden_of, mark_of, offer, reference_of, unpacked
    from fedge_client.updater.store import Opened, Record, State, Store
    from fedge_client.updater.streams import Fetcher, Pace, chunks_of, folder, whole, within
    from fedge_client.updater.trust import Clock, Limits, Target, Trust, Trusted

__all__ = [
    "Artefact",
    "Check",
    "Clock",
    "Expand",
    "Fetcher",
    "Installer",
    "Limits",
    "Offered",
    "Opened",
    "Pace",
    "Patch",
    "Record",
    "State",
    "Store",
    "Target",
    "Trust",
    "Trusted",
    "anything",
    "chunks_of",
    "folder",
    "golden_of",
    "mark_of",
    "model_check",
    "offer",
    "reference_of",
    "unpacked",
    "whole",
    "within",
]

_PARTS: Final = {
    "health": ("Check", "anything", "model_check"),
    "installer": ("Artefact", "Expand", "Installer", "Patch"),
    "releases": ("Offered", "golden_of", "mark_of", "offer", "reference_of", "unpacked"),
    "store": ("Opened", "Record", "State", "Store"),
    "streams": ("Fetcher", "Pace", "chunks_of", "folder", "whole", "within"),
    "trust": ("Clock", "Limits", "Target", "Trust", "Trusted"),
}
_HOME: Final = {name: part for part, names in _PARTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
