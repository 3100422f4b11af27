"""The threads that a follower keeps equal to their source.

For each thread a stamp of the source's rows as they were when the thread was last brought up to date. It
commits together with the thread's rows. No identity columns, triggers, foreign keys or unique indexes
beside the primary key: the table may be distributed by ``run_id`` (Citus).

Revision: 0004, after what undo needs.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; one that is there although no revision says so is taken over."""
    # Read in the order of code points, as the source is.
    by_code_point = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "persistence_followed",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("thread_id", by_code_point, primary_key=True),
        sa.Column("stamp", sa.Text, nullable=False),
        sa.Column("checkpoints", sa.BigInteger, nullable=False),
        sa.Column("writes", sa.BigInteger, nullable=False),
        schema=op.get_context().version_table_schema,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the table; a follower then has to compare everything."""
    op.drop_table("persistence_followed", schema=op.get_context().version_table_schema, if_exists=True)
