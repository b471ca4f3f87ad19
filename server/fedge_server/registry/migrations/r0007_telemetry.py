"""Telemetry of devices, and what is known of drift."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0005"


def upgrade() -> None:
    """Add the tables; what was there stays as it is."""
    op.create_table(
        "telemetry_windows",
        sa.Column("device_id", sa.String(64), primary_key=True),
        sa.Column("slot", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tier", sa.String(32), nullable=False),
        sa.Column("version", sa.Integer, sa.ForeignKey("releases.version"), nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("received", sa.Double, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_telemetry_windows_release", "telemetry_windows", ["tier", "version", "received"])
    op.create_index("ix_telemetry_windows_received", "telemetry_windows", ["received"])
    op.create_table(
        "drift_watches",
        sa.Column("tier", sa.String(32), primary_key=True),
        sa.Column("version", sa.Integer, sa.ForeignKey("releases.version"), primary_key=True),
        sa.Column("state", sa.JSON, nullable=False),
    )
    op.create_table(
        "drift_tracks",
        sa.Column("device_id", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, sa.ForeignKey("releases.version"), primary_key=True),
        sa.Column("state", sa.JSON, nullable=False),
    )
