"""Rollouts: their plans, states, devices, reports and tallies; and the audit trail."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the tables; what was there stays as it is."""
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tier", sa.String(32), nullable=False),
        sa.Column("version", sa.Integer, sa.ForeignKey("releases.version"), nullable=False),
        sa.Column("plan", sa.JSON, nullable=False),
        sa.Column("state", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("ix_rollouts_tier", "rollouts", ["tier"])
    op.create_table(
        "rollout_tiers",
        sa.Column("tier", sa.String(32), primary_key=True),
        sa.Column("base", sa.Integer, nullable=False),
        sa.Column("floor", sa.Integer, nullable=False),
        sa.Column("rollout", sa.String(64), sa.ForeignKey("rollouts.id")),
    )
    _of_devices()
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("who", sa.String(255), nullable=False),
        sa.Column("what", sa.String(255), nullable=False),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
    )


def _of_devices() -> None:
    op.create_table(
        "rollout_devices",
        sa.Column("rollout_id", sa.String(64), sa.ForeignKey("rollouts.id"), primary_key=True),
        sa.Column("device_id", sa.String(64), primary_key=True),
        sa.Column("stage", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("offered", sa.Double, nullable=False),
    )
    op.create_table(
        "rollout_reports",
        sa.Column("device_id", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("version", sa.Integer, sa.ForeignKey("releases.version"), primary_key=True),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("reported", sa.Double, nullable=False),
    )
    op.create_table(
        "rollout_tallies",
        sa.Column("rollout_id", sa.String(64), sa.ForeignKey("rollouts.id"), primary_key=True),
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("judged", sa.Integer, nullable=False),
        sa.Column("bad", sa.Integer, nullable=False),
    )
