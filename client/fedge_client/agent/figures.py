"""What the agent tells Prometheus: a text file for the node exporter's textfile collector.

The device needs no further library and no port. The file is whole or absent, and is not synced: it is written
anew every few seconds, best to a folder in memory. docs/monitoring.md has the table of the metrics.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedge import __version__
from fedge.errors import FedgeError
from fedge_client.device import Device, exists
from fedge_client.reports import Reports
from fedge_client.telemetry.outgoing import FOLDER as TELEMETRY

log = logging.getLogger("fedge.agent")

Value = tuple[str, str, float]
"""Name of a figure, value of its label (empty: it has none), number."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric."""

    name: str
    kind: str  # gauge, counter
    about: str
    labels: tuple[str, ...] = ()  # one at most
    known: tuple[str, ...] = ()  # values of the label that are there from the start, at 0


FIGURES: Final = (
    Figure("fedge_agent_info", "gauge", "1; the label is the version of fedge", ("version",)),
    Figure("fedge_agent_connected", "gauge", "1 while the stream to the server is there"),
    Figure("fedge_agent_refused", "gauge", "1 while the server refuses this device"),
    Figure("fedge_agent_last_contact_timestamp_seconds", "gauge", "When the server was there last"),
    Figure("fedge_agent_certificate_expiry_timestamp_seconds", "gauge", "When the certificate ends"),
    Figure("fedge_agent_clock_skew_seconds", "gauge", "This clock less the server's, at the last connection"),
    Figure("fedge_agent_release_version", "gauge", "The release that answers; 0: none"),
    Figure("fedge_agent_previous_version", "gauge", "The one in the other slot; 0: none"),
    Figure("fedge_agent_quarantined", "gauge", "Contents that failed their trial here"),
    Figure("fedge_agent_working", "gauge", "Messages that are here to be answered"),
    Figure("fedge_agent_outbox", "gauge", "Answers that the server does not have yet"),
    Figure("fedge_agent_reports_waiting", "gauge", "Reports on releases that it does not have yet"),
    Figure("fedge_agent_telemetry_windows_waiting", "gauge", "Windows of telemetry, likewise"),
    Figure("fedge_agent_resident_memory_bytes", "gauge", "Of the agent, without its children"),
    Figure("fedge_agent_cpu_seconds_total", "counter", "Of the agent, and of children that have ended"),
    Figure("fedge_agent_connections_total", "counter", "Connections that the server has welcomed"),
    Figure(
        "fedge_agent_messages_total",
        "counter",
        "Messages, by what became of them",
        ("outcome",),
        ("done", "failed", "refused", "cancelled", "late"),
    ),
    Figure(
        "fedge_agent_installs_total",
        "counter",
        "Installations; refused: something about the release or its metadata is wrong",
        ("outcome",),
        ("installed", "failed", "refused"),
    ),
    Figure(
        "fedge_agent_bytes_total",
        "counter",
        "Tensor bytes of messages",
        ("direction",),
        ("down", "up"),
    ),
)
_BY_NAME: Final = {figure.name: figure for figure in FIGURES}


class Counts:
    """What rises while the agent runs; of one event loop."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], float] = {
            (figure.name, label): 0.0
            for figure in FIGURES
            if figure.kind == "counter"
            for label in figure.known or ("",)
        }

    def add(self, name: str, label: str = "", amount: float = 1.0) -> None:
        """Count; a name or label that is not in FIGURES is a fault of fedge."""
        self._found[name, label] += amount

    def values(self) -> list[Value]:
        """All of them."""
        return [(name, label, value) for (name, label), value in self._found.items()]


COUNTED: Final = Counts()
"""Of this process: one agent."""


def text(values: Iterable[Value]) -> str:
    """The exposition format, version 0.0.4; figures in the order of FIGURES."""
    by_name: dict[str, list[tuple[str, float]]] = {}
    for name, label, value in values:
        by_name.setdefault(name, []).append((label, value))
    lines: list[str] = []
    for figure in FIGURES:
        if samples := by_name.get(figure.name):
            lines += [f"# HELP {figure.name} {figure.about}", f"# TYPE {figure.name} {figure.kind}"]
            lines += [f"{figure.name}{_label(figure, label)} {value!r}" for label, value in samples]
    return "\n".join(lines) + "\n"


def _label(figure: Figure, value: str) -> str:
    if not figure.labels:
        return ""
    plain = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{{figure.labels[0]}="{plain}"}}'


def looked_up(home: Path, facts: Mapping[str, Any]) -> list[Value]:
    """Gauges, from what the agent says of itself and from the device's files; damaged ones are left out."""
    connected = facts.get("state") == "connected"
    contact = time.time() if connected else facts.get("last_contact")
    found: list[tuple[str, Any]] = [
        ("connected", connected),
        ("refused", facts.get("state") == "refused"),
        ("last_contact_timestamp_seconds", contact),
        ("certificate_expiry_timestamp_seconds", facts.get("certificate_not_after")),
        ("clock_skew_seconds", facts.get("clock_skew_s")),
        ("working", len(facts.get("working", ()))),
        ("outbox", facts.get("outbox")),
        ("telemetry_windows_waiting", sum(1 for _ in (home / TELEMETRY).rglob("*.window"))),
        ("resident_memory_bytes", _resident_bytes()),
        ("cpu_seconds_total", sum(os.times()[:4])),
    ]
    with suppress(FedgeError, OSError):
        if exists(home):
            state = Device.open(home).store.state()
            found += [
                ("release_version", state.current.version if state.current else 0),
                ("previous_version", state.previous.version if state.previous else 0),
                ("quarantined", len(state.quarantined)),
                ("reports_waiting", len(Reports(home).waiting())),
            ]
    plain = [(f"fedge_agent_{name}", "", float(value)) for name, value in found if value is not None]
    return [("fedge_agent_info", __version__, 1.0), *plain]


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Textfile:
    """Writes the file again and again.

    Args:
        path: of the file; its folder is there, or nothing is written.
        home: of the device.
        facts: that the agent says of itself now.
        interval_s: between two writings.
    """

    def __init__(
        self, path: Path, home: Path, facts: Callable[[], Mapping[str, Any]], interval_s: float
    ) -> None:
        self._path, self._home, self._facts, self._interval_s = path, home, facts, interval_s
        self._fault = ""

    async def run(self) -> None:
        """Write, for ever."""
        while True:
            values = COUNTED.values()  # here, on the loop that counts
            await asyncio.to_thread(self.write, values, dict(self._facts()))
            await asyncio.sleep(self._interval_s)

    def write(self, counted: Iterable[Value], facts: Mapping[str, Any]) -> None:
        """Write now; what refuses it is said once, and does not stop the agent."""
        new = self._path.with_name(f".{self._path.name}.new")  # the collector reads *.prom
        try:
            kept = {(name, label): value for name, label, value in counted}
            kept |= {(name, label): value for name, label, value in looked_up(self._home, facts)}
            new.write_text(text((*key, value) for key, value in kept.items()), encoding="utf-8")
            new.chmod(0o644)
            new.replace(self._path)
            self._fault = ""
        except OSError as error:
            if str(error) != self._fault:
                log.warning("metrics: %s cannot be written (%s)", self._path, error.strerror)
            self._fault = str(error)
