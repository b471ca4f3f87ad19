"""Drafts: variants that have passed their gate and wait to be signed, and what became of each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the tables; variants of earlier releases have no golden inputs."""
    op.add_column("variants", sa.Column("golden", sa.String(64), nullable=False, server_default=""))
    op.create_table(
        "drafts",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("manifest", sa.String(64), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_table(
        "draft_variants",
        sa.Column("draft", sa.String(16), sa.ForeignKey("drafts.id"), primary_key=True),
        sa.Column("tier", sa.String(32), primary_key=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("wire", sa.String(64), nullable=False),
        sa.Column("evidence", sa.String(64), nullable=False),
        sa.Column("golden", sa.String(64), nullable=False),
        sa.Column("release", sa.Integer, sa.ForeignKey("releases.version")),
    )
