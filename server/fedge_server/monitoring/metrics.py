"""Every metric of the server, in one place; docs/monitoring.md has the same table, and a test compares them.

Names are Prometheus's: `fedge_`, base units, `_total` for what only rises, `_timestamp_seconds` for moments.
No label holds a device's id or a text of a device's: labels are tiers, reasons out of a list, states, roles,
folders, and the names of the runs under way (at most MAX_RUNS).

Counters belong to the process. A worker has none: what it does stands in the registry, where the hub reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily

from fedge_server.rollout.reports import NUMBERS, VERDICTS
from fedge_server.rounds.record import KINDS

CERTIFICATE_REASONS: Final = (
    *("none", "malformed", "authority", "purpose", "name", "expired", "not_yet_valid"),
    *("unknown_device", "revoked"),
)
ENROLMENT_REASONS: Final = (
    *("token_malformed", "token_unknown", "token_expired", "token_used", "clock", "unknown_device"),
    *("revoked", "malformed", "rate", "internal"),
)
HUB_EVENTS: Final = (  # of fedge.logs.EVENTS; the others are a signer's or a device's
    *("certificate_refused", "enrolment_refused", "foreign_request", "answer_refused", "report_refused"),
    *("update_rejected", "update_stands_out", "verification_failed"),
)
MAX_RUNS: Final = 16  # runs that have series of their own at a time: those under way, the newest first
_SECONDS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_SCORES: Final = (0.5, 1, 1.5, 2, 3, 4, 6, 10, 30, 100)  # robust deviations; 4 and more stands out


disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, and no news


@dataclass(frozen=True, slots=True)
class Gauge:
    """What is looked up when somebody asks."""

    name: str
    about: str
    labels: tuple[str, ...] = ()

    def family(self) -> GaugeMetricFamily:
        """An empty one, to be filled for one answer."""
        return GaugeMetricFamily(self.name, self.about, labels=self.labels)


def _counter(name: str, about: str, *labels: str) -> Counter:
    return Counter(name, about, labels, registry=None)


def _histogram(name: str, about: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(name, about, buckets=buckets, registry=None)


# --- devices and messages
CONNECTIONS: Final = _counter("fedge_connections_total", "Streams of devices that began", "tier")
MESSAGES: Final = _counter("fedge_messages_total", "Messages for devices that were queued")
ANSWERS: Final = _counter("fedge_answers_total", "Answers of devices, by what became of them", "outcome")
GIVEN_UP: Final = _counter("fedge_messages_given_up_total", "Messages that failed: their device stayed away")
EXPIRED: Final = _counter("fedge_messages_expired_total", "Messages closed at their deadline")
ANSWER_SECONDS: Final = _histogram(
    "fedge_answer_seconds", "From work written to a device until its answer was committed", _SECONDS
)
LINK_BYTES: Final = _counter("fedge_link_bytes_total", "Tensor bytes of runs that travelled", "direction")
ENROLMENTS: Final = _counter("fedge_enrolments_total", "Certificates given against a token", "tier")
RENEWALS: Final = _counter("fedge_renewals_total", "Certificates renewed")

# --- releases
DELIVERED_BYTES: Final = _counter("fedge_delivered_bytes_total", "Bytes of releases sent to devices")
REPORTS: Final = _counter("fedge_device_reports_total", "New reports of devices on a version", "kind")

# --- answers
INFERENCES: Final = _counter("fedge_inference_requests_total", "Questions to global models", "outcome")
WINDOWS: Final = _counter("fedge_telemetry_windows_total", "Windows that devices sent", "outcome")

# --- runs, as their records in the registry say
WORKER_RESTARTS: Final = _counter("fedge_worker_restarts_total", "Workers started again after their death")
ROUNDS: Final = _counter(
    "fedge_rounds_total", "Rounds committed; too_few left the model as it was", "outcome"
)
ROUND_SECONDS: Final = _histogram("fedge_round_seconds", "Duration of a round", _SECONDS)
UPDATES: Final = _counter("fedge_updates_total", "Updates of clients that were aggregated")
UPDATES_LATE: Final = _counter("fedge_updates_late_total", "Answers that came when nobody waited any more")
UPDATES_REJECTED: Final = _counter("fedge_updates_rejected_total", "Updates left out of a round", "reason")
ANOMALY_SCORES: Final = _histogram(
    "fedge_update_anomaly_score", "How much an update stands out, in robust deviations", _SCORES
)
STANDING_OUT: Final = _counter("fedge_updates_standing_out_total", "Updates that stood out in their round")

# --- security
EVENTS: Final = _counter("fedge_security_events_total", "Records of the logger fedge.security", "event")
CERTIFICATES_REFUSED: Final = _counter(
    "fedge_certificates_refused_total", "Calls refused for their certificate", "reason"
)
ENROLMENTS_REFUSED: Final = _counter(
    "fedge_enrolments_refused_total", "Enrolments and renewals refused", "reason"
)

# --- what is looked up
BUILD: Final = Gauge("fedge_build_info", "1; the label is the version of fedge", ("version",))
DEVICES: Final = Gauge("fedge_devices", "Devices that are enrolled, or were revoked", ("tier", "status"))
DEVICES_EXPIRED: Final = Gauge(
    "fedge_devices_expired", "Active devices whose certificate has expired", ("tier",)
)
DEVICES_ONLINE: Final = Gauge("fedge_devices_online", "Devices that are connected", ("tier",))
MESSAGES_OPEN: Final = Gauge("fedge_messages_open", "Messages that wait for an answer")
MESSAGES_UNSENT: Final = Gauge("fedge_messages_unsent", "Of these, those that no device has been sent yet")
COMMITS_WAITING: Final = Gauge("fedge_commits_waiting", "Answers that wait for the database")
POLLS_WAITING: Final = Gauge("fedge_polls_waiting", "Devices that wait to hear of a release")
STREAMS_OPEN: Final = Gauge("fedge_delivery_streams", "Files of releases under way to devices")
LOOP_DELAY: Final = Gauge("fedge_loop_delay_seconds", "How long the hub's loop took to answer this question")
RUNS: Final = Gauge("fedge_runs", "Runs in the registry", ("status",))
WORKERS: Final = Gauge("fedge_workers", "Workers that run")
RUN_ROUND: Final = Gauge("fedge_run_round", "The last committed round", ("run",))
RUN_ROUNDS: Final = Gauge("fedge_run_rounds_planned", "The most rounds that the run may take", ("run",))
RUN_CLIENTS: Final = Gauge("fedge_run_clients", "Updates in that round", ("run",))
RUN_ASKED: Final = Gauge("fedge_run_clients_asked", "Clients asked in that round", ("run",))
RUN_LOSS: Final = Gauge("fedge_run_loss", "Loss on the server's test data after that round", ("run",))
RUN_ACCURACY: Final = Gauge("fedge_run_accuracy_ratio", "Accuracy there, 0 to 1", ("run",))
RUN_SECONDS: Final = Gauge("fedge_run_round_duration_seconds", "Duration of that round", ("run",))
RUN_EPSILON: Final = Gauge("fedge_run_privacy_epsilon", "Epsilon spent by the run's ledger", ("run",))
RELEASES: Final = Gauge("fedge_releases", "Releases that were published")
RELEASE_VERSION: Final = Gauge("fedge_release_version", "The newest version on offer", ("tier",))
VARIANTS: Final = Gauge(
    "fedge_draft_variants", "Variants to be signed: waiting, refused by a signer, published", ("status",)
)
ROLLOUTS: Final = Gauge("fedge_rollouts", "The newest rollout of each tier, by its state", ("tier", "status"))
DRIFT_ALARM: Final = Gauge(
    "fedge_drift_alarm", "1: an alarm stands under the tier's newest release with windows", ("tier",)
)
CERTIFICATE_ENDS: Final = Gauge(
    "fedge_certificate_expiry_timestamp_seconds", "When it ends: the first CA, the server's", ("certificate",)
)
METADATA_ENDS: Final = Gauge(
    "fedge_metadata_expiry_timestamp_seconds", "When a role of the repository ends", ("role",)
)
DATABASE_UP: Final = Gauge("fedge_database_up", "1: it answered; 0: what it holds is missing here")
DATABASE_BYTES: Final = Gauge("fedge_database_size_bytes", "Of the database, its log included")
DISK_FREE: Final = Gauge("fedge_disk_free_bytes", "Free to the server on the disk of its home")
DISK_SIZE: Final = Gauge("fedge_disk_size_bytes", "Size of that disk")
FOLDER_BYTES: Final = Gauge("fedge_folder_size_bytes", "Files of a folder of the home", ("folder",))

COUNTED: Final[tuple[Counter | Histogram, ...]] = tuple(
    value for value in list(globals().values()) if isinstance(value, Counter | Histogram)
)
LOOKED_UP: Final[tuple[Gauge, ...]] = tuple(
    value for value in list(globals().values()) if isinstance(value, Gauge)
)
LINK_DOWN, LINK_UP = LINK_BYTES.labels("down"), LINK_BYTES.labels("up")  # of each chunk: looked up once

# Known from the start: what appears at its first count has no increase that Prometheus could see.
for _metric, _values in (
    (ANSWERS, ("accepted", "again", "late", "refused")),
    (ROUNDS, ("counted", "too_few")),
    (UPDATES_REJECTED, KINDS),
    (EVENTS, HUB_EVENTS),
    (CERTIFICATES_REFUSED, CERTIFICATE_REASONS),
    (ENROLMENTS_REFUSED, ENROLMENT_REASONS),
    (REPORTS, (*VERDICTS, *NUMBERS)),
):
    for _value in _values:
        _metric.labels(_value)


def counted() -> CollectorRegistry:
    """A registry with all that this process counts."""
    registry = CollectorRegistry()
    for metric in COUNTED:
        registry.register(metric)
    return registry
