"""Makes an empty database ready to be written to, in the transaction that writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from psycopg import Cursor

from persistence import schema
from persistence.backends.postgres.tables import HAS_LZ4, SET_COMPRESSION, TRY_LOCK, PostgresTables

if TYPE_CHECKING:
    from persistence.contract import Provider

_HOLDS_SOMETHING = " OR ".join(
    [
        *(
            f"EXISTS (SELECT 1 FROM {table})"
            for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes")
        ),
        "EXISTS (SELECT 1 FROM persistence_transfers WHERE state <> 'undone')",
    ]
)


def prepare(provider: Provider, cursor: Cursor[tuple[Any, ...]], told: Callable[[], None]) -> bool:
    """Have all tables in the transaction that is open; gives whether they hold no threads and no runs.

    Where the database has none of them, they are made here, and are gone if the transaction is rolled back.
    Meanwhile whoever else sets this database up waits.

    Args:
        provider: The database.
        cursor: Of the transaction.
        told: Called when that is known, and before they are made.
    """
    if not schema.check(provider):
        cursor.execute(f"SELECT {_HOLDS_SOMETHING}".encode())
        return not cursor.fetchall()[0][0]
    cursor.execute(TRY_LOCK.encode(), {"schema": provider.settings.db_schema})
    if not cursor.fetchall()[0][0]:
        return False
    with PostgresTables(provider) as tables:
        if tables.observed():
            return False
        langgraph = tables.langgraph_sql().replace("CREATE INDEX CONCURRENTLY", "CREATE INDEX")
    told()
    cursor.execute(langgraph.encode())
    cursor.execute(schema.own_sql().encode())
    if cursor.execute(HAS_LZ4.encode()).fetchall():
        for statement in SET_COMPRESSION:
            cursor.execute(statement.format("lz4").encode())
    return True
