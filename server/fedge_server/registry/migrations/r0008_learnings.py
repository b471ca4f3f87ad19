"""Learnings: what the server learns again without a hand on it, and where each stands."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the table; what was there stays as it is."""
    op.create_table(
        "learnings",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("terms", sa.JSON, nullable=False),
        sa.Column("state", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
