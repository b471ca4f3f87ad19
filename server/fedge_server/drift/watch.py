"""Watches the devices of one tier under one release: `observe` takes a window, and says what is known then.

Each device is compared with itself: its first windows under the release are its baseline, for devices
differ from one another for good. Bets (`detector`) are on four streams: inputs, confidence and answers of
devices that have a baseline, and *newcomers*, each new device's baseline against the release's reference,
ranked among those of the devices before it. The alarm is raised when the mean of the four streams' evidence
reaches `Settings.threshold`: what holds for each of them holds for their mean, so that the rate is that of
all streams, features and looks together.

Nothing here reads a clock or a database; a watch and a device's track are plain values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from fedge.errors import UserError
from fedge.telemetry.sketch import CELLS
from fedge_server.drift.detector import Evidence, Ranks, log_mean
from fedge_server.drift.scores import STREAMS, Shapes, distances

NEWCOMERS: Final = "newcomers"
ALL: Final = (*STREAMS, NEWCOMERS)
SPOILT: Final = 100.0  # times as frequent as stated may `at_least` - 1 devices that lie make false alarms


@dataclass(frozen=True, slots=True)
class Settings:
    """How drift is looked for.

    Raises:
        UserError: a number is out of range.
    """

    false_alarms: float = 0.01  # chance of an alarm within `periods` in which nothing changes
    periods: int = 100
    at_least: int = 3  # devices: fewer raise no alarm by themselves, whatever they send (see SPOILT)
    baseline: int = 5  # windows of a device that it is compared with
    least_answers: int = 30  # in a window; one with fewer is not looked at

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 0 < self.false_alarms < 1:
            raise UserError(f"drift: false_alarms = {self.false_alarms:g}: must be above 0 and below 1")
        for name in ("periods", "at_least", "baseline", "least_answers"):
            if getattr(self, name) < 1:
                raise UserError(f"drift: {name} = {getattr(self, name)}: must be 1 or more")

    @property
    def threshold(self) -> float:
        """Natural logarithm of the evidence that raises the alarm; also periods between false alarms."""
        return math.log(self.periods / self.false_alarms)

    @property
    def room(self) -> float:
        """By how much one device may raise the logarithm of the evidence."""
        return math.inf if self.at_least == 1 else math.log(SPOILT) / (self.at_least - 1)


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something has changed."""

    stream: str  # of ALL: where most speaks for it
    log_evidence: float  # natural logarithm of the mean over the streams
    period: int  # in which it was raised


@dataclass(frozen=True, slots=True)
class Watch:
    """What is known of one tier under one release."""

    evidence: Mapping[str, Evidence] = field(default_factory=lambda: dict.fromkeys(ALL, Evidence()))
    newcomers: Ranks = field(default_factory=Ranks)  # of the devices' baselines
    period: int = -1  # the newest
    windows: int = 0  # looked at
    alarm: Alarm | None = None  # the first; it stands until there is another release

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the mean over the streams."""
        return log_mean([evidence.log for evidence in self.evidence.values()])

    @property
    def strongest(self) -> str:
        """The stream that speaks most for a change."""
        return max(ALL, key=lambda name: self.evidence[name].log)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        alarm = self.alarm
        return {
            "evidence": {name: list(evidence.logs) for name, evidence in self.evidence.items()},
            "newcomers": self.newcomers.to_json(),
            "period": self.period,
            "windows": self.windows,
            "alarm": [alarm.stream, alarm.log_evidence, alarm.period] if alarm else None,
        }

    @classmethod
    def from_json(cls, value: Any) -> Watch:
        """Of `to_json`."""
        evidence = {name: Evidence(tuple(map(float, value["evidence"][name]))) for name in ALL}
        alarm = Alarm(*value["alarm"]) if value["alarm"] else None
        return cls(evidence, Ranks.from_json(value["newcomers"]), value["period"], value["windows"], alarm)


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """What is known of one device under one release."""

    baseline: Shapes | None = None  # its first windows together
    windows: int = 0  # in the baseline
    slot: int = -1  # its newest
    ranks: Mapping[str, Ranks] = field(default_factory=lambda: dict.fromkeys(STREAMS, Ranks()))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        own = self.baseline
        parts = [own.inputs.tolist(), own.confidence.tolist(), own.answers.tolist()] if own else None
        return {
            "baseline": parts,
            "windows": self.windows,
            "slot": self.slot,
            "ranks": {name: ranks.to_json() for name, ranks in self.ranks.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Track:
        """Of `to_json`."""
        parts = value["baseline"]
        baseline = None
        if parts is not None:
            inputs = np.array(parts[0], np.float64)
            shaped = inputs if inputs.ndim == 2 else inputs.reshape(0, CELLS)  # without a reference
            baseline = Shapes(shaped, *(np.array(part, np.float64) for part in parts[1:]))
        ranks = {name: Ranks.from_json(value["ranks"][name]) for name in STREAMS}
        return cls(baseline, value["windows"], value["slot"], ranks)


Observed = tuple[Watch, Track]


def observe(
    settings: Settings,
    watch: Watch,
    track: Track,
    *,
    period: int,
    slot: int,
    window: Shapes,
    reference: Shapes | None,
) -> Observed:
    """What is known after a window of a device; an older one than its newest changes nothing.

    Args:
        settings: of the watch.
        watch: of the tier and release.
        track: of the device.
        period: in which the window came, by the server's clock: false alarms are counted in these.
        slot: of the window among the device's.
        window: its histograms.
        reference: the release's; None: newcomers are not looked at.
    """
    if slot <= track.slot or window.count < settings.least_answers:
        return watch, track
    if track.baseline is not None and not window.fits(track.baseline):
        return watch, track
    if period > watch.period:
        begun = {name: evidence.next_period() for name, evidence in watch.evidence.items()}
        watch = replace(watch, evidence=begun, period=period)
    watch = replace(watch, windows=watch.windows + 1)
    if track.windows < settings.baseline:
        watch, track = _in_baseline(settings, watch, track, window, reference)
    else:
        watch, track = _compared(settings, watch, track, window)
    track = replace(track, slot=slot)
    if watch.alarm is None and watch.log_evidence >= settings.threshold:
        watch = replace(watch, alarm=Alarm(watch.strongest, watch.log_evidence, watch.period))
    return watch, track


def _in_baseline(
    settings: Settings, watch: Watch, track: Track, window: Shapes, reference: Shapes | None
) -> Observed:
    """One of a device's first windows; with the last of them it is a newcomer."""
    baseline = window if track.baseline is None else track.baseline + window
    track = replace(track, baseline=baseline, windows=track.windows + 1)
    if track.windows < settings.baseline or reference is None or not baseline.fits(reference):
        return watch, track
    score = sum(distances(baseline, reference).values())
    # Each device is here once: what it may raise is its own, and not what is left by those before it.
    fresh = Ranks(watch.newcomers.scores)
    steps = fresh.steps(score, settings.room)
    evidence = {**watch.evidence, NEWCOMERS: watch.evidence[NEWCOMERS].after(steps)}
    return replace(watch, evidence=evidence, newcomers=fresh.after(score, steps)), track


def _compared(settings: Settings, watch: Watch, track: Track, window: Shapes) -> Observed:
    """A later one, against the device's own baseline."""
    assert track.baseline is not None  # noqa: S101 - it has one after its first window
    evidence, ranks = dict(watch.evidence), dict(track.ranks)
    for name, score in distances(window, track.baseline).items():
        steps = ranks[name].steps(score, settings.room)
        evidence[name] = evidence[name].after(steps)
        ranks[name] = ranks[name].after(score, steps)
    return replace(watch, evidence=evidence), replace(track, ranks=ranks)
