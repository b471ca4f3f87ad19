"""Signals of security: each one is a record of the logger `fedge.security` and counts, in one call.

Reasons that become labels are out of short lists; whatever else a device says goes into the record alone.
"""

from __future__ import annotations

from typing import Final

from fedge import logs
from fedge.errors import FedgeError, FormatError, IdentityError
from fedge_server.monitoring import metrics
from fedge_server.rollout.reports import NUMBERS, VERDICTS
from fedge_server.rounds.record import HOSTILE, RoundRecord

_FAILED: Final = ("install_failed", "unhealthy")
_OTHER: Final = "other"


def certificate_refused(error: IdentityError, peer: str, device: str | None) -> None:
    """A call ended because of who makes it; `device` is None where the certificate does not say."""
    metrics.CERTIFICATES_REFUSED.labels(error.kind).inc()
    about = {"reason": error.kind, "peer": peer, "device": device}
    _signal("certificate_refused", f"refused {peer}: {error}", **about)


def enrolment_refused(what: str, error: FedgeError | None, peer: str) -> None:
    """Enrol or renew was refused; None: it came too soon after others of the same address."""
    reason = "rate" if error is None else _reason(error)
    metrics.ENROLMENTS_REFUSED.labels(reason).inc()
    said = "too many requests" if error is None else str(error)
    _signal("enrolment_refused", f"refused {what} from {peer}: {said}", reason=reason, peer=peer)


def foreign_request(device: str | None, what: str) -> None:
    """A device asked for something that is not for it."""
    _signal("foreign_request", f"device {device or '?'} asked for what is not its own: {what}", device=device)


def answer_refused(device: str, run: str, message: str, reason: str) -> None:
    """An answer was none that may be taken in."""
    line = f"device {device}: answer to message {message} refused: {reason}"
    _signal("answer_refused", line, device=device, run=run, message_id=message, reason=reason)


def reported(device: str, version: int, kind: str) -> None:
    """A device has reported something new of a version."""
    metrics.REPORTS.labels(kind if kind in VERDICTS or kind in NUMBERS else _OTHER).inc()
    if kind in _FAILED:
        line = f"device {device[:16]}: release {version}: {kind}"
        _signal("verification_failed", line, device=device, version=version, reason=kind)


def report_refused(device: str, error: FedgeError) -> None:
    """A device has reported what cannot be."""
    _signal("report_refused", str(error), device=device)


def round_committed(run: str, record: RoundRecord) -> None:
    """Count what a round's record says, and tell of updates that were left out or stand out."""
    metrics.ROUNDS.labels("counted" if record.counted else "too_few").inc()
    metrics.ROUND_SECONDS.observe(record.seconds)
    metrics.UPDATES.inc(record.clients)
    metrics.UPDATES_LATE.inc(record.late)
    for rejected in record.rejected:
        metrics.UPDATES_REJECTED.labels(rejected.kind).inc()
        if rejected.kind in HOSTILE:
            line = f"run {run}, round {record.round}: update of node {rejected.client}: {rejected.reason}"
            about = {"run": run, "round": record.round, "node": rejected.client, "reason": rejected.kind}
            _signal("update_rejected", line, **about)
    for score in record.anomalies:
        metrics.ANOMALY_SCORES.observe(score.value)
        if score.stands_out:
            metrics.STANDING_OUT.inc()
            line = f"run {run}, round {record.round}: update of node {score.client} stands out"
            about = {"run": run, "round": record.round, "node": score.client, "score": score.value}
            _signal("update_stands_out", line, **about)


def _reason(error: FedgeError) -> str:
    if isinstance(error, IdentityError):
        return error.kind
    return "malformed" if isinstance(error, FormatError) else "internal"


def _signal(event: str, line: str, **fields: object) -> None:
    metrics.EVENTS.labels(event).inc()
    plain = "".join(character if character.isprintable() else "?" for character in line)
    logs.security(event, "%s", plain, **fields)  # one record is one line, whatever a device has sent
