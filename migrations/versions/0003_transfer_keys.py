"""What the ledger needs to undo a transfer and to keep what could not be moved.

Which rows each batch inserted, what was done about threads that the target had already, and the rows
that were set aside. As in 0001, all tables may be distributed by ``run_id``.

Revision: 0003, after the canary.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables; those that are there although no revision says so are taken over."""
    schema = op.get_context().version_table_schema
    op.create_table(
        "persistence_transfer_keys",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("batch_no", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("keys", sa.LargeBinary, nullable=False),
        schema=schema,
        if_not_exists=True,
    )
    op.create_table(
        "persistence_transfer_threads",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("thread_id", sa.Text, primary_key=True),
        sa.Column("action", sa.Text, nullable=False),
        schema=schema,
        if_not_exists=True,
    )
    op.create_table(
        "persistence_transfer_rejects",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("reject_no", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("thread", sa.LargeBinary, nullable=False),  # UTF-8: it may be what cannot be text here
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("raw", sa.LargeBinary, nullable=False),
        schema=schema,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the tables: earlier transfers can no longer be undone, rows set aside are gone."""
    schema = op.get_context().version_table_schema
    for table in ("rejects", "threads", "keys"):
        op.drop_table(f"persistence_transfer_{table}", schema=schema, if_exists=True)
