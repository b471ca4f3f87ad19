"""One installation over the service, from being told a version to the reports of what became of it.

The agent runs it in a process of its own (`python -m fedge_client.agent.installation HOME VERSION ...`): the
TUF library, onnxruntime and the model are gone from memory afterwards, and whatever a bad model does there
ends there.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fedge.errors import (
    DowngradeError,
    ExpiredError,
    FedgeError,
    FetchError,
    HealthError,
    IdentityError,
    SignatureError,
    TrustError,
    UnlistedError,
)
from fedge.golden import inputs_of
from fedge.inference import CompactModel
from fedge_client.agent.limits import limit
from fedge_client.agent.standing import Done
from fedge_client.delivery import Delivery, Report
from fedge_client.device import Device
from fedge_client.installing import install, refresh, reject_current
from fedge_client.reports import Reports
from fedge_client.updater.streams import Fetcher

_SEED: Final = 1  # of the inputs that latency is measured with

# Nothing of these is the fault of the version: it comes again, or newer metadata does.
_NOT_ITS_FAULT: Final = (FetchError, ExpiredError, DowngradeError, SignatureError, IdentityError)


def bring(device: Device, fetch: Fetcher, told: int) -> Done:
    """Install the version that the server told, or only follow the metadata; make the reports of it.

    Args:
        device: whose.
        fetch: gets files of the repository.
        told: the version; 0: none, but there is newer metadata.
    """
    changed, fault, passing, refused, reports = False, "", False, "", []
    try:
        if told:
            changed = install(device, fetch, told=told).changed
        else:
            refresh(device, fetch)
    except (FedgeError, OSError) as error:
        fault, passing = str(error), _is_passing(error)
        # A tier that has no release yet stands nowhere: whoever has none and was told of none lacks nothing.
        early = isinstance(error, UnlistedError) and not told and device.store.state().current is None
        refused = type(error).__name__ if isinstance(error, TrustError) and not early else ""
        if told and not passing:
            reports.append(Report(told, "install_failed"))
    counted = device.store.state().counted
    version = counted.version if counted else 0
    kept = Reports(device.home)
    if version and not kept.has_said(version, "installed"):  # now, or before a kill that came too early
        reports += [Report(version, "installed"), *_health(device, version)]
        counted = device.store.state().counted
        version = counted.version if counted else 0
    with contextlib.suppress(OSError):
        kept.add(reports)
    return Done(version, changed, fault, passing, refused)


def _is_passing(error: Exception) -> bool:
    """Whether the version is not at fault, or another process is at work on it."""
    return isinstance(error, _NOT_ITS_FAULT) or isinstance(error.__cause__, BlockingIOError)


def _health(device: Device, version: int) -> list[Report]:
    """Answer with what was committed, as it lies on the disk; leave it where that fails."""
    try:
        milliseconds = _latency_ms(device)
    except TrustError as error:
        with contextlib.suppress(FedgeError):  # there may be nothing to return to
            reject_current(device)
        sys.stderr.write(f"release {version}: {error}\n")
        return [Report(version, "unhealthy")]
    return [Report(version, "healthy"), Report(version, "latency_ms", milliseconds)]


def _latency_ms(device: Device) -> float:
    """Median milliseconds of an answer.

    Raises:
        TrustError: it does not load, or gives no usable answer.
    """
    installed, data = device.running()
    if installed.damaged:
        raise HealthError(installed.damaged)
    spec = installed.release.spec
    model, taken = CompactModel(data, spec), []
    for row in inputs_of(spec, _SEED):
        start = time.perf_counter()
        _, probabilities = model.run(row[np.newaxis])
        taken.append((time.perf_counter() - start) * 1000)
        if not np.isfinite(probabilities).all():
            raise HealthError("its answers are no numbers")
    return statistics.median(taken)


def main(arguments: Sequence[str]) -> int:
    """Do it for the agent that has started this process, and print one line."""
    home, (told, *limits) = Path(arguments[0]), map(int, arguments[1:5])
    limit(*limits)
    from fedge_client.agent.identity import Identity

    try:
        device = Device.open(home)
        with Delivery(lambda: Identity.open(home)) as service:
            done = bring(device, service.fetch, told)
    except (FedgeError, OSError) as error:
        done = Done(0, fault=str(error))
    sys.stdout.buffer.write(done.to_line())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
