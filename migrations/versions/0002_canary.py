"""The canary of the health check.

One row, written and read back by every health check, so that health says what a saver would meet: a
database that is full or may only be read answers a ``SELECT 1``, too.

Revision: 0002, after the transfer ledger.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; one that is there although no revision says so is taken over."""
    op.create_table(
        "persistence_canary",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("beat", sa.Text, nullable=False),
        schema=op.get_context().version_table_schema,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("persistence_canary", schema=op.get_context().version_table_schema, if_exists=True)
