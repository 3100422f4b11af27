"""What undo needs of a run that follows its source: which rows each of its rounds inserted.

A thread has parts, in the order in which they were written; each commits together with its rows. What the
first copy inserted stands with its batches. No identity columns, triggers, foreign keys or unique indexes
beside the primary key: the table may be distributed by ``run_id`` (Citus).

Revision: 0005, after the followed threads.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; one that is there although no revision says so is taken over."""
    # Read in the order of code points, as the batches of the first copy are.
    by_code_point = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "persistence_followed_keys",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("thread_id", by_code_point, primary_key=True),
        sa.Column("part_no", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("forgets", sa.Text, nullable=False),
        sa.Column("keys", sa.LargeBinary, nullable=False),
        schema=op.get_context().version_table_schema,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the table; runs that followed their source can no longer be undone."""
    op.drop_table("persistence_followed_keys", schema=op.get_context().version_table_schema, if_exists=True)
