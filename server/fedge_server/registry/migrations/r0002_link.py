"""The link: devices, tokens and the queue; Alembic's version takes the place of `about`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add what the link needs; runs and rounds stay as they are."""
    for column in (
        sa.Column("session", sa.String(32), nullable=False, server_default=""),
        sa.Column("late", sa.Integer, nullable=False, server_default="0"),
        sa.Column("bytes_down", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("bytes_up", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("restarts", sa.Integer, nullable=False, server_default="0"),
    ):
        op.add_column("runs", column)
    _devices()
    _queue()
    op.drop_table("about")


def _devices() -> None:
    op.create_table(
        "devices",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("node_id", sa.BigInteger, nullable=False, unique=True),
        sa.Column("tier", sa.String(32), nullable=False),
        sa.Column("public_key", sa.Text, nullable=False),
        sa.Column("sealing_key", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("enrolled", sa.Double, nullable=False),
        sa.Column("revoked", sa.Double),
        sa.Column("last_seen", sa.Double),
        sa.Column("certificate_not_after", sa.Double, nullable=False),
        sa.Column("wire_version", sa.Integer, nullable=False),
        sa.Column("fedge_version", sa.String(64), nullable=False),
        sa.Column("bundle", sa.String(64), nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("tier", sa.String(32), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("expires", sa.Double, nullable=False),
        sa.Column("used_by", sa.String(64)),
        sa.Column("used", sa.Double),
    )


def _queue() -> None:
    op.create_table(
        "contents",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "messages",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("session", sa.String(32), nullable=False),
        sa.Column("device_id", sa.String(64), nullable=False),
        sa.Column("node_id", sa.BigInteger, nullable=False),
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("task_digest", sa.String(64), nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("group_id", sa.String(64), nullable=False),
        sa.Column("content", sa.String(64)),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("deadline", sa.Double, nullable=False),
        sa.Column("max_result_bytes", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("result", sa.LargeBinary),
        sa.Column("spool", sa.String(255), nullable=False),
    )
    op.create_index("ix_messages_run_id", "messages", ["run_id"])
    op.create_index("ix_messages_content", "messages", ["content"])
