"""One real device process per published variant: install from the release, answer the gate's inputs.

A device is the `fedge-client` command in a process of its own, without torch, exactly as on an edge node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedge.dataset import Examples
from fedge.errors import FedgeError
from fedge_server.compression import TierOutcome, Variant
from fedge_server.registry.publish import PUBLIC_KEY
from fedge_server.release import KEYS, PUBLISHED

TIMEOUT_S = 300.0
DEVICES = "devices"  # folder of device homes in a run folder


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
        return {
            "id": self.id,
            "tier": self.tier,
            "release": self.release,
            "accuracy": self.accuracy,
            "same_as_gate": self.same_as_gate,
        }


def deliver(
    folder: Path, outcomes: Sequence[TierOutcome], gate: Examples, labels: Sequence[str]
) -> tuple[DeviceResult, ...]:
    """Install each published variant on a device of its tier and hold its answers to the gate's.

    Args:
        folder: run folder with the published release; device homes are made in its `devices/`.
        outcomes: of the compression; tiers without a variant have no device.
        gate: the gate's raw inputs and true classes.
        labels: names of the classes.

    Raises:
        FedgeError: a device process failed.
    """
    variants = [outcome.variant for outcome in outcomes if outcome.variant is not None]
    with tempfile.TemporaryDirectory(prefix="fedge-") as scratch:
        inputs = Path(scratch) / "gate.npy"
        np.save(inputs, gate.x)
        return tuple(_one_device(folder, variant, inputs, gate, labels) for variant in variants)


def _one_device(
    folder: Path, variant: Variant, inputs: Path, gate: Examples, labels: Sequence[str]
) -> DeviceResult:
    name = f"{variant.tier}-1"
    home = folder / DEVICES / name
    key = folder / KEYS / PUBLIC_KEY
    published = folder / PUBLISHED
    _client(
        home,
        "install",
        str(published),
        *(() if home.exists() else ("--tier", variant.tier, "--trust", str(key))),
    )
    status = json.loads(_client(home, "status", "--format", "json"))
    answers = json.loads(_client(home, "infer", str(inputs), "--format", "json"))["predictions"]
    found = np.array([answer["label"] for answer in answers])
    probabilities = np.array([[a["probabilities"][label] for label in labels] for a in answers], np.float32)
    scored = np.array(labels)[variant.probabilities.argmax(1)]
    return DeviceResult(
        id=name,
        tier=variant.tier,
        release=int(status["version"]),
        accuracy=float((found == np.array(labels)[gate.y]).mean()),
        same_as_gate=bool((found == scored).all() and np.array_equal(probabilities, variant.probabilities)),
    )


def _client(home: Path, *arguments: str) -> str:
    """Run the device's own command and return what it printed."""
    command = [sys.executable, "-m", "fedge_client", *arguments, "--home", str(home)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise FedgeError(
            f"device {home.name}: {arguments[0]} did not end within {TIMEOUT_S:.0f} s"
        ) from error
    if done.returncode != 0:
        raise FedgeError(
            f"device {home.name}: {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout
