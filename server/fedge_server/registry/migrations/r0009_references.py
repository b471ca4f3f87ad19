"""References of telemetry: which object of the store a variant's is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the columns; variants of earlier releases have none."""
    for table in ("variants", "draft_variants"):
        op.add_column(table, sa.Column("reference", sa.String(64), nullable=False, server_default=""))
