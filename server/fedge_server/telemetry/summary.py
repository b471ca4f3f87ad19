"""What many windows say together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from fedge.telemetry.sketch import ROUTES, Sketch, latency_quantile, mean_confidence
from fedge.telemetry.window import Window

QUANTILES: Final = (0.5, 0.95, 0.99)


@dataclass(slots=True, eq=False)
class Summary:
    """Of windows of one release: their sums."""

    sketch: Sketch
    devices: set[str] = field(default_factory=set)
    windows: int = 0
    lost: int = 0  # windows that devices could not keep
    noisy: int = 0  # windows with noise in their counts
    cpu_s: float = 0.0
    memory_bytes: int = 0  # the largest of any device

    @classmethod
    def of(cls, windows: Iterable[tuple[str, Window]]) -> Summary | None:
        """Add up windows (device, window), one after the other; None without any.

        Of windows whose sketches are of different sizes, which one release does not give, those of the size
        that most have.
        """
        found: dict[tuple[int, int], Summary] = {}
        for device, window in windows:
            size = len(window.sketch.inputs), len(window.sketch.answers)
            if size not in found:
                found[size] = cls(Sketch.empty(*size))
            found[size].add(device, window)
        return max(found.values(), key=lambda each: each.windows, default=None)

    def add(self, device: str, window: Window) -> None:
        """One more."""
        self.devices.add(device)
        self.windows += 1
        self.lost += window.lost
        self.noisy += window.epsilon > 0
        self.cpu_s += window.cpu_s
        self.memory_bytes = max(self.memory_bytes, window.memory_bytes)
        for own, more in zip(self.sketch.parts().values(), window.sketch.parts().values(), strict=True):
            own += more

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
            "devices": len(self.devices),
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
