"""What many windows say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedge.telemetry.sketch import ROUTES, Sketch, latency_quantile, mean_confidence
from fedge.telemetry.window import Window

QUANTILES: Final = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """Of windows of one release: their sums."""

    devices: int
    windows: int
    lost: int  # windows that devices could not keep
    noisy: int  # windows with noise in their counts
    cpu_s: float
    memory_bytes: int  # the largest of any device
    sketch: Sketch

    @classmethod
    def of(cls, windows: Sequence[tuple[str, Window]]) -> Summary | None:
        """Add up windows (device, window) whose sketches are of one size; None without any."""
        if not windows:
            return None
        found = [window for _, window in windows]
        return cls(
            devices=len({device for device, _ in windows}),
            windows=len(found),
            lost=sum(window.lost for window in found),
            noisy=sum(window.epsilon > 0 for window in found),
            cpu_s=sum(window.cpu_s for window in found),
            memory_bytes=max(window.memory_bytes for window in found),
            sketch=Sketch.sum([window.sketch for window in found]),
        )

    @property
    def requests(self) -> int:
        """How many there were; with noise, about so many."""
        return max(int(self.sketch.routes.sum()), 0)

    def share(self, *routes: str) -> float:
        """Of the requests that ended so."""
        counts = sum(max(int(self.sketch.routes[ROUTES.index(route)]), 0) for route in routes)
        return counts / max(self.requests, 1)

    def to_json(self) -> dict[str, Any]:
        """What a person or a program looks at; figures that are not known are left out."""
        latency = {f"p{round(q * 100)}_s": latency_quantile(self.sketch.latency, q) for q in QUANTILES}
        found: dict[str, Any] = {
            "devices": self.devices,
            "windows": self.windows,
            "lost": self.lost,
            "noisy": self.noisy,
            "requests": self.requests,
            "errors": self.share("error"),
            "sent_to_cloud": self.share("cloud", "cloud_timeout", "cloud_failed"),
            "cloud_timeouts": self.share("cloud_timeout"),
            "confidence": mean_confidence(self.sketch.confidence),
            "answers": self.sketch.answers.tolist(),
            "latency": {name: value for name, value in latency.items() if value is not None},
            "cpu_s": self.cpu_s,
            "memory_bytes": self.memory_bytes,
        }
        return {name: value for name, value in found.items() if value is not None}
