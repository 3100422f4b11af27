"""The transfer ledger.

Which runs moved data into this database, and which batches they have committed.
No identity columns, triggers, foreign keys or unique indexes beside the primary keys: both tables
may be distributed by ``run_id`` (Citus). A batch's row commits together with the batch's data.

Revision: 0001, the first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables; one that is there although no revision says so is taken over."""
    schema = op.get_context().version_table_schema
    op.create_table(
        "persistence_transfers",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("source_fingerprint", sa.Text, nullable=False),
        sa.Column("target_identity", sa.Text, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("options", sa.Text, nullable=False),
        sa.Column("totals", sa.Text),
        schema=schema,
        if_not_exists=True,
    )
    op.create_table(
        "persistence_transfer_batches",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("batch_no", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("thread_id", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("checkpoints", sa.Integer, nullable=False),
        sa.Column("writes", sa.Integer, nullable=False),
        sa.Column("blobs", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("committed_at", sa.DateTime(timezone=True), nullable=False),
        schema=schema,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop both tables, and with them the record of earlier transfers."""
    schema = op.get_context().version_table_schema
    op.drop_table("persistence_transfer_batches", schema=schema, if_exists=True)
    op.drop_table("persistence_transfers", schema=schema, if_exists=True)
