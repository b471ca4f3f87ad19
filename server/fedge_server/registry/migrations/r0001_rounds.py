"""Runs, rounds and releases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables of the first release."""
    op.create_table("about", sa.Column("schema_version", sa.Integer, primary_key=True))
    op.create_table(
        "runs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("data", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("record", sa.JSON, nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("state", sa.String(64), nullable=False),
        sa.Column("committed", sa.String(32), nullable=False),
    )
    op.create_table(
        "releases",
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("global_model", sa.String(64), nullable=False),
        sa.Column("manifest", sa.String(64), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_table(
        "variants",
        sa.Column("release", sa.Integer, sa.ForeignKey("releases.version"), primary_key=True),
        sa.Column("tier", sa.String(32), primary_key=True),
        sa.Column("recipe", sa.String(255), nullable=False),
        sa.Column("wire", sa.String(64), nullable=False),
        sa.Column("installed", sa.String(64), nullable=False),
        sa.Column("evidence", sa.String(64), nullable=False),
    )
