"""The items of the store that a follower keeps equal to their source.

For each item a stamp of the source's row as it was when the item was last brought up to date, a mark of the
content that was written then, and two of its moments; it commits together with the item. That is also what
undo needs. No identity columns, triggers, foreign keys or unique indexes beside the primary key: the table
may be distributed by ``run_id`` (Citus).

Revision: 0006, after the keys of followed threads.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; one that is there although no revision says so is taken over."""
    # Read in the order of code points, as the source is.
    by_code_point = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "persistence_followed_items",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("prefix", by_code_point, primary_key=True),
        sa.Column("key", by_code_point, primary_key=True),
        sa.Column("stamp", sa.Text, nullable=False),
        sa.Column("mark", sa.LargeBinary, nullable=False),
        sa.Column("updated_at", sa.BigInteger),
        sa.Column("expires_at", sa.BigInteger),
        schema=op.get_context().version_table_schema,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the table; runs that followed a store can no longer be continued or undone."""
    op.drop_table("persistence_followed_items", schema=op.get_context().version_table_schema, if_exists=True)
