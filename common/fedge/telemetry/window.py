"""A window as a value, and as bounded bytes: `fedge.v1.TelemetryWindow`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from google.protobuf.message import DecodeError

from fedge.errors import FormatError
from fedge.telemetry.privacy import MAX_EPSILON
from fedge.telemetry.sketch import CELLS, MAX_COUNT, Sketch, Whole
from fedge.telemetry.views import MAX_FEATURES
from fedge.wire.v1.telemetry_pb2 import TelemetryWindow

FORMAT: Final = 1
MAX_BYTES: Final = 16 * 1024  # of a window: 1,080 counts at most, of 6 bytes at most
MAX_WINDOWS: Final = 64  # of a request
MAX_SLOT: Final = 2**40
PERIODS_S: Final = (10, 7 * 86_400)  # the shortest and the longest window
_DIGEST = re.compile(r"[0-9a-f]{64}|")


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What a device answered in one piece of time.

    Raises:
        FormatError: a field is out of range, or counts do not fit together.
    """

    slot: int  # names it among the device's; rises
    period_s: int
    version: int  # of the release
    sketch: Sketch
    reference: str = ""  # SHA-256 of the reference; empty: none
    epsilon: float = 0.0  # of the noise in the sketch; 0: none
    cpu_s: float = 0.0
    memory_bytes: int = 0
    lost: int = 0  # windows before it that could not be kept

    def __post_init__(self) -> None:
        """Refuse what no honest device sends: one of them must not spoil the sums of all."""
        ranges = {
            "slot": (self.slot, 0, MAX_SLOT),
            "period_s": (self.period_s, *PERIODS_S),
            "version": (self.version, 1, 2**31 - 1),
            "epsilon": (self.epsilon, 0, MAX_EPSILON),
            "cpu_s": (self.cpu_s, 0, 1e9),
            "memory_bytes": (self.memory_bytes, 0, 2**50),
            "lost": (self.lost, 0, MAX_COUNT),
        }
        for name, (value, least, most) in ranges.items():
            if not (math.isfinite(value) and least <= value <= most):
                raise FormatError(f"telemetry: {name} = {value:g}: must be {least} to {most}")
        if not _DIGEST.fullmatch(self.reference):
            raise FormatError("telemetry: reference is no SHA-256")
        if len(self.sketch.inputs) > MAX_FEATURES or bool(self.reference) != bool(len(self.sketch.inputs)):
            raise FormatError(f"telemetry: {len(self.sketch.inputs)} features, reference {self.reference!r}")
        if not self.epsilon and not self.sketch.is_exact:
            raise FormatError("telemetry: the counts of a window without noise do not add up")

    def to_bytes(self) -> bytes:
        """As it travels."""
        numbers = {name: values.ravel().tolist() for name, values in self.sketch.parts().items()}
        message = TelemetryWindow(
            format=FORMAT,
            slot=self.slot,
            period_s=self.period_s,
            version=self.version,
            reference=bytes.fromhex(self.reference),
            epsilon=self.epsilon,
            cpu_s=self.cpu_s,
            memory_bytes=self.memory_bytes,
            lost=self.lost,
            **numbers,
        )
        return bytes(message.SerializeToString(deterministic=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what came over a network or from a disk.

        Raises:
            FormatError: it is none.
        """
        if len(data) > MAX_BYTES:
            raise FormatError(f"telemetry: a window of {len(data)} bytes is longer than {MAX_BYTES}")
        try:
            message = TelemetryWindow.FromString(data)
        except DecodeError as error:
            raise FormatError("telemetry: a window cannot be read") from error
        if message.format != FORMAT:
            raise FormatError(f"telemetry: a window of format {message.format}, not {FORMAT}")
        try:
            inputs = _whole(message.inputs).reshape(-1, CELLS)
            one = (message.confidence, message.answers, message.latency, message.routes)
            sketch = Sketch(inputs, *(_whole(values) for values in one))
        except ValueError as error:
            raise FormatError(f"telemetry: {error}") from error
        return cls(
            message.slot,
            message.period_s,
            message.version,
            sketch,
            message.reference.hex(),
            message.epsilon,
            message.cpu_s,
            message.memory_bytes,
            message.lost,
        )


def _whole(values: Sequence[int]) -> Whole:
    return np.array(values, np.int64)
