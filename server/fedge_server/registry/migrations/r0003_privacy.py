"""The privacy ledger: one row for each round whose noised result may have been seen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the ledger; what was there stays as it is."""
    op.create_table(
        "privacy",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("ledger", sa.String(64), nullable=False),
        sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("noise", sa.String(64), nullable=False),
        sa.Column("mechanism", sa.String(16), nullable=False),
        sa.Column("unit", sa.String(16), nullable=False),
        sa.Column("sampling", sa.Double, nullable=False),
        sa.Column("noise_multiplier", sa.Double, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
        sa.Column("spent", sa.String(32), nullable=False),
        sa.UniqueConstraint("run_id", "round", "noise", name="uq_privacy"),
    )
    op.create_index("ix_privacy_ledger", "privacy", ["ledger"])
