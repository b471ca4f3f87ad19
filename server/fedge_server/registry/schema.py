"""The tables, as the newest revision in `migrations` makes them: a change here needs a revision there."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

REVISIONS: Final = (
    "0001",
    "0002",
    "0003",
    "0004",
    "0005",
    "0007",
    "0008",
    "0009",
    "0010",
)  # oldest first; a database at any other was written by a newer fedge
HEAD: Final = REVISIONS[-1]

metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("data", sa.String(64), nullable=False),  # digest of the server's data; empty until it begins
    sa.Column("status", sa.String(16), nullable=False),  # queued, running, stopping, stopped, done, failed
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("session", sa.String(32), nullable=False, server_default=""),  # of the worker that may queue
    sa.Column("late", sa.Integer, nullable=False, server_default="0"),  # answers since the last close
    sa.Column("bytes_down", sa.BigInteger, nullable=False, server_default="0"),  # since the last close
    sa.Column("bytes_up", sa.BigInteger, nullable=False, server_default="0"),  # since the last close
    sa.Column("restarts", sa.Integer, nullable=False, server_default="0"),  # of its worker
    sa.Column("retired", sa.Double),  # Unix seconds: since then its model and state are not kept
)
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
    sa.Column("model", sa.String(64), nullable=False),  # SHA-256 of the safetensors in the store
    sa.Column("state", sa.String(64), nullable=False),  # SHA-256 of the strategy's state in the store
    sa.Column("committed", sa.String(32), nullable=False),
)
releases = sa.Table(
    "releases",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("global_model", sa.String(64), nullable=False),
    sa.Column("manifest", sa.String(64), nullable=False),  # SHA-256 of the signed manifest's payload
    sa.Column("created", sa.String(32), nullable=False),
)
variants = sa.Table(
    "variants",
    metadata,
    sa.Column("release", sa.ForeignKey("releases.version"), primary_key=True),
    sa.Column("tier", sa.String(32), primary_key=True),
    sa.Column("recipe", sa.String(255), nullable=False),
    sa.Column("wire", sa.String(64), nullable=False),
    sa.Column("installed", sa.String(64), nullable=False),
    sa.Column("evidence", sa.String(64), nullable=False),  # SHA-256 of the gate report
    sa.Column(
        "golden", sa.String(64), nullable=False, server_default=""
    ),  # SHA-256; empty: nothing of it is in the store
    sa.Column("reference", sa.String(64), nullable=False, server_default=""),  # of telemetry; empty: none
    sa.Column("retired", sa.Double),  # Unix seconds: since then its bytes are not kept, see living.py
)
devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),  # SHA-256 of its public key (SubjectPublicKeyInfo, DER)
    sa.Column("node_id", sa.BigInteger, nullable=False, unique=True),  # 63 bits of the id, for Flower
    sa.Column("tier", sa.String(32), nullable=False),
    sa.Column("public_key", sa.Text, nullable=False),  # PEM
    sa.Column("sealing_key", sa.String(64), nullable=False),  # X25519, hexadecimal
    sa.Column("status", sa.String(16), nullable=False),  # active, revoked
    sa.Column("reason", sa.Text, nullable=False),  # of the revocation
    sa.Column("enrolled", sa.Double, nullable=False),  # Unix seconds, as all times below
    sa.Column("revoked", sa.Double),
    sa.Column("last_seen", sa.Double),
    sa.Column("certificate_not_after", sa.Double, nullable=False),
    sa.Column("wire_version", sa.Integer, nullable=False),
    sa.Column("fedge_version", sa.String(64), nullable=False),
    sa.Column("bundle", sa.String(64), nullable=False),  # SHA-256 of the CA bundle it holds; empty: unknown
)
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("tier", sa.String(32), nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("expires", sa.Double, nullable=False),
    sa.Column("used_by", sa.String(64)),  # a device's id
    sa.Column("used", sa.Double),
)
contents = sa.Table(
    "contents",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),  # SHA-256 of the body
    sa.Column("body", sa.LargeBinary, nullable=False),  # a serialised Content
)
messages = sa.Table(
    "messages",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("session", sa.String(32), nullable=False),
    sa.Column("device_id", sa.String(64), nullable=False),
    sa.Column("node_id", sa.BigInteger, nullable=False),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("task_digest", sa.String(64), nullable=False),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("group_id", sa.String(64), nullable=False),
    sa.Column("content", sa.String(64), index=True),  # of contents; null once nobody needs it
    sa.Column("created", sa.Double, nullable=False),  # Unix seconds
    sa.Column("deadline", sa.Double, nullable=False),  # Unix seconds
    sa.Column("max_result_bytes", sa.BigInteger, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # see queue.py
    sa.Column("result", sa.LargeBinary),  # a serialised Result
    sa.Column("spool", sa.String(255), nullable=False),  # file that holds the result's object; empty: none
)
privacy = sa.Table(
    "privacy",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("ledger", sa.String(64), nullable=False, index=True),  # whose data: runs that share it add up
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("noise", sa.String(64), nullable=False),  # which draw of noise: each other one is another row
    sa.Column("mechanism", sa.String(16), nullable=False),
    sa.Column("unit", sa.String(16), nullable=False),  # client, example
    sa.Column("sampling", sa.Double, nullable=False),  # probability to take part; 1: no amplification
    sa.Column("noise_multiplier", sa.Double, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("spent", sa.String(32), nullable=False),
    sa.UniqueConstraint("run_id", "round", "noise", name="uq_privacy"),
)
rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),  # tier and version
    sa.Column("tier", sa.String(32), nullable=False, index=True),
    sa.Column("version", sa.ForeignKey("releases.version"), nullable=False),
    sa.Column("plan", sa.JSON, nullable=False),
    sa.Column("state", sa.JSON, nullable=False),
    sa.Column("created", sa.Double, nullable=False),  # Unix seconds
)
rollout_tiers = sa.Table(
    "rollout_tiers",
    metadata,
    sa.Column("tier", sa.String(32), primary_key=True),
    sa.Column("base", sa.Integer, nullable=False),  # version that every device of the tier may have; 0: none
    sa.Column("floor", sa.Integer, nullable=False),  # only rises
    sa.Column("rollout", sa.ForeignKey("rollouts.id")),  # the newest
)
rollout_devices = sa.Table(
    "rollout_devices",
    metadata,
    sa.Column("rollout_id", sa.ForeignKey("rollouts.id"), primary_key=True),
    sa.Column("device_id", sa.String(64), primary_key=True),
    sa.Column("stage", sa.Integer, nullable=False),  # from 0
    sa.Column("state", sa.String(16), nullable=False),  # offered, installed, left
    sa.Column("offered", sa.Double, nullable=False),  # Unix seconds
)
rollout_reports = sa.Table(
    "rollout_reports",
    metadata,
    sa.Column("device_id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("version", sa.ForeignKey("releases.version"), primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("reported", sa.Double, nullable=False),  # Unix seconds
    sa.Index("ix_rollout_reports_version", "version"),
)
rollout_tallies = sa.Table(
    "rollout_tallies",
    metadata,
    sa.Column("rollout_id", sa.ForeignKey("rollouts.id"), primary_key=True),
    sa.Column("name", sa.String(16), primary_key=True),  # a criterion's kind, installed, left
    sa.Column("judged", sa.Integer, nullable=False),  # devices
    sa.Column("bad", sa.Integer, nullable=False),  # of these
)
drafts = sa.Table(
    "drafts",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),  # begins the digest
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("manifest", sa.String(64), nullable=False),  # SHA-256 of a manifest in the store
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("global_model", sa.String(64), nullable=False, server_default=""),  # empty: see the manifest
)
draft_variants = sa.Table(
    "draft_variants",
    metadata,
    sa.Column("draft", sa.ForeignKey("drafts.id"), primary_key=True),
    sa.Column("tier", sa.String(32), primary_key=True),
    sa.Column("status", sa.String(16), nullable=False),  # waiting, refused, published
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("wire", sa.String(64), nullable=False),  # SHA-256 of an object in the store, as the two below
    sa.Column("evidence", sa.String(64), nullable=False),
    sa.Column("golden", sa.String(64), nullable=False),
    sa.Column("release", sa.ForeignKey("releases.version")),  # under which it was published
    sa.Column("reference", sa.String(64), nullable=False, server_default=""),  # empty: it has none
    sa.Column("retired", sa.Double),  # Unix seconds: it was refused, and since then its bytes are not kept
)
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),  # from 1, without a gap
    sa.Column("at_ms", sa.BigInteger, nullable=False),  # Unix milliseconds
    sa.Column("who", sa.String(255), nullable=False),
    sa.Column("what", sa.String(255), nullable=False),
    sa.Column("subject", sa.String(255), nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),  # digest of the entry before
    sa.Column("digest", sa.String(64), nullable=False),  # SHA-256 of all of the above as canonical JSON
)
telemetry_windows = sa.Table(
    "telemetry_windows",
    metadata,
    sa.Column("device_id", sa.String(64), primary_key=True),
    sa.Column("slot", sa.BigInteger, primary_key=True, autoincrement=False),  # names it among the device's
    sa.Column("tier", sa.String(32), nullable=False),
    sa.Column("version", sa.ForeignKey("releases.version"), nullable=False),  # that answered
    sa.Column("tags", sa.JSON, nullable=False),  # of the device, when it came
    sa.Column("received", sa.Double, nullable=False),  # Unix seconds
    sa.Column("body", sa.LargeBinary, nullable=False),  # a serialised TelemetryWindow
    sa.Index("ix_telemetry_windows_release", "tier", "version", "received"),
    sa.Index("ix_telemetry_windows_received", "received"),
)
drift_watches = sa.Table(
    "drift_watches",
    metadata,
    sa.Column("tier", sa.String(32), primary_key=True),
    sa.Column("version", sa.ForeignKey("releases.version"), primary_key=True),
    sa.Column("state", sa.JSON, nullable=False),
)
drift_tracks = sa.Table(
    "drift_tracks",
    metadata,
    sa.Column("device_id", sa.String(64), primary_key=True),
    sa.Column("version", sa.ForeignKey("releases.version"), primary_key=True),
    sa.Column("state", sa.JSON, nullable=False),
)
learnings = sa.Table(
    "learnings",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),  # begins the names of its runs
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("config", sa.JSON, nullable=False),  # of the runs
    sa.Column(
        "terms", sa.JSON, nullable=False
    ),  # when it learns again, from what, and how that is rolled out
    sa.Column("state", sa.JSON, nullable=False),  # continual.State
    sa.Column("created", sa.Double, nullable=False),  # Unix seconds
)
