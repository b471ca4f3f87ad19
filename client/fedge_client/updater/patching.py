"""Make a version's bytes out of those that run, with a delta: where that fails, the whole is fetched.

The delta need not be trusted: the installer compares the digest of what comes out, as for all it installs.
"""

from __future__ import annotations

from collections.abc import Callable

from fedge import delta
from fedge.delivery import delta_path
from fedge.errors import FedgeError
from fedge_client.updater.installer import Artefact, Patch
from fedge_client.updater.store import Opened
from fedge_client.updater.streams import DEFAULT_PACE, Fetcher, Pace, whole

LEAST_BYTES = 10_000  # of what travels: less is fetched whole at once


def patching(
    fetch: Fetcher, tier: str, opened: Callable[[bytes], bytes] = bytes, *, pace: Pace = DEFAULT_PACE
) -> Patch:
    """The `Patch` of fedge's variants.

    Args:
        fetch: gets `deltas/TIER/BASE/VERSION`.
        tier: of this device.
        opened: makes the delta from what travels, where the tier is sealed.
        pace: how slow a stream may be.
    """

    def patch(runs: Opened, offered: Artefact) -> bytes | None:
        if offered.length < LEAST_BYTES or offered.installed_bytes is None:
            return None
        if runs.record.installed_sha256 == offered.installed_sha256:
            return runs.data  # old content under a new version: nothing need travel
        name = delta_path(tier, runs.record.version, offered.version)
        try:
            made = opened(whole(fetch, name, offered.length, pace=pace))
            return delta.apply(runs.data, made, offered.installed_bytes)
        except FedgeError:  # there is none, or it is for another base: the whole will do
            return None

    return patch
