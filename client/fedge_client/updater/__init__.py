"""Get onto a device what it may run, and nothing else, whatever fails on the way.

trust       which files are to be trusted: metadata of The Update Framework, over any transport
installer   an artefact that verified metadata names, into the slot that does not run, and its trial
patching    the installed bytes out of those that run, where that is shorter
store       what is committed, and how it is opened
health      the trial of a model
streams     reading from any transport: bounded, held to a pace
manifest    releases in a published folder with a signed manifest, until all devices have metadata
"""

from fedge_client.updater.health import Check, Golden, anything, model_check
from fedge_client.updater.installer import Artefact, Expand, Installer, Patch
from fedge_client.updater.manifest import (
    Device,
    Fetch,
    Installed,
    Offer,
    Updater,
    decide,
    floor_after,
    folder_fetch,
)
from fedge_client.updater.patching import patching
from fedge_client.updater.releases import Offered, mark_of, offer, unpacked
from fedge_client.updater.store import Opened, Record, State, Store
from fedge_client.updater.streams import Fetcher, Pace, chunks_of, folder, whole, within
from fedge_client.updater.trust import Clock, Limits, Target, Trust, Trusted

__all__ = [
    "Artefact",
    "Check",
    "Clock",
    "Device",
    "Expand",
    "Fetch",
    "Fetcher",
    "Golden",
    "Installed",
    "Installer",
    "Limits",
    "Offer",
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
    "Updater",
    "anything",
    "chunks_of",
    "decide",
    "floor_after",
    "folder",
    "folder_fetch",
    "mark_of",
    "model_check",
    "offer",
    "patching",
    "unpacked",
    "whole",
    "within",
]
