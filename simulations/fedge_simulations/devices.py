"""One real device process per published variant: install from the release, answer the gate's inputs.

A device is the `fedge-client` command in a process of its own, without torch, exactly as on an edge node.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.dataset import Examples
from fedge_simulations.processes import completed

DEVICES = "devices"  # folder of device homes in a run folder


@dataclass(frozen=True, slots=True)
class DeviceHome:
    """A device that is to install a variant."""

    id: str
    tier: str
    home: Path


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """What one device answered."""

    id: str
    tier: str
    release: int  # version that answered
    accuracy: float  # on the gate's examples, fraction of 1
    same_as_gate: bool  # every label and probability equals what the gate scored, sample by sample

    def to_json(self) -> dict[str, Any]:
        """The entry of summary.json."""
        return asdict(self)


def deliver(
    folder: Path,
    devices: Sequence[DeviceHome],
    scored: Mapping[str, npt.NDArray[np.float32]],
    gate: Examples,
    labels: Sequence[str],
) -> tuple[DeviceResult, ...]:
    """Install the published variant of its tier on each device and hold its answers to the gate's.

    Args:
        folder: the repository of releases, or a stick with what these devices need of it.
        devices: whom to deliver to; tiers without a variant are left out.
        scored: by tier, the probabilities (N, classes) that the gate scored.
        gate: the gate's N raw inputs and true classes.
        labels: names of the classes.

    Raises:
        FedgeError: a device process failed.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-") as scratch:
        inputs = Path(scratch) / "gate.npy"
        np.save(inputs, gate.x)
        return tuple(
            _one_device(folder, device, scored[device.tier], inputs, gate, labels)
            for device in devices
            if device.tier in scored
        )


def _one_device(
    folder: Path,
    device: DeviceHome,
    scored: npt.NDArray[np.float32],
    inputs: Path,
    gate: Examples,
    labels: Sequence[str],
) -> DeviceResult:
    first = not (device.home / "delivery" / "tier.json").exists()
    trust = ("--tier", device.tier, "--root", str(folder / "metadata" / "1.root.json")) if first else ()
    _client(device, "install", str(folder), *trust)
    status = json.loads(_client(device, "status", "--format", "json"))
    answers = json.loads(_client(device, "infer", str(inputs), "--format", "json"))["predictions"]
    found = np.array([answer["label"] for answer in answers])
    probabilities = np.array([[a["probabilities"][label] for label in labels] for a in answers], np.float32)
    best = np.array(labels)[scored.argmax(1)]
    return DeviceResult(
        id=device.id,
        tier=device.tier,
        release=int(status["version"]),
        accuracy=float((found == np.array(labels)[gate.y]).mean()),
        same_as_gate=bool((found == best).all() and np.array_equal(probabilities, scored)),
    )


def _client(device: DeviceHome, *arguments: str) -> str:
    """Run the device's own command and return what it printed."""
    return completed("fedge_client", *arguments, "--home", str(device.home), name=f"device {device.id}")
