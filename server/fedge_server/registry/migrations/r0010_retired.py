"""What is no longer kept: since when; which model of the store a draft is of; and reports of a version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the columns: everything is kept so far, and of earlier drafts the manifest names the model."""
    for table in ("runs", "variants", "draft_variants"):
        op.add_column(table, sa.Column("retired", sa.Double))
    op.create_index("ix_rollout_reports_version", "rollout_reports", ["version"])
    op.add_column("drafts", sa.Column("global_model", sa.String(64), nullable=False, server_default=""))
