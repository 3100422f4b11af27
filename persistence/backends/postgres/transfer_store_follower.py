"""The store of a Postgres database as a target that is kept equal to a source, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persistence.transfer.items import Key
from persistence.transfer.live_store import (
    CLAIM,
    ItemChange,
    ItemClaim,
    claim_of,
    claimed_items,
    count_items,
    require_ours,
)

if TYPE_CHECKING:
    from psycopg import Cursor

    from persistence.backends.postgres.transfer_sink import PostgresSink

_SHOWN = 3
_AMONG = "run_id = %s AND (prefix, key) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
_NOTE = f"""
INSERT INTO persistence_followed_items (run_id, {CLAIM})
SELECT %s, * FROM unnest(%s::text[], %s::text[], %s::text[], %s::bytea[], %s::bigint[], %s::bigint[])
"""
_STRAYS = f"""
SELECT f.prefix, f.key FROM persistence_followed_items f
LEFT JOIN store s ON s.prefix = f.prefix AND s.key = f.key
WHERE f.run_id = ? AND CASE WHEN s.key IS NULL
    THEN coalesce(f.expires_at > extract(epoch FROM now()) * 1000000, true)
    ELSE extract(epoch FROM s.updated_at) * 1000000 IS DISTINCT FROM f.updated_at END LIMIT {_SHOWN}
"""


class PostgresStoreFollower:
    """The items that one run has brought; see :class:`persistence.transfer.live_store.StoreFollower`."""

    def __init__(self, sink: PostgresSink, run_id: str) -> None:
        self._sink = sink
        self._run_id = run_id

    def claims(self, after: Key | None, limit: int) -> list[ItemClaim]:
        """See :class:`persistence.transfer.live_store.StoreFollower`. The columns sort by code point."""
        return claimed_items(self._sink, self._run_id, after, limit)

    def claims_of(self, keys: Sequence[Key]) -> Mapping[Key, ItemClaim]:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        with self._sink.transaction() as cursor:
            return self._claims_of(cursor, keys)

    def apply(self, changes: Sequence[ItemChange]) -> None:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        keys = [change.key for change in changes]
        store = self._sink.store()
        with self._sink.transaction() as cursor:
            claims = self._claims_of(cursor, keys, "FOR UPDATE")
            held = store.locked(keys)
            for change in changes:
                require_ours(change, claims.get(change.key), held.get(change.key), self._sink.label)
            gone = [change.key for change in changes if change.writes and change.key in held]
            store.replace(gone, [change.item for change in changes if change.item is not None])
            cursor.execute(
                f"DELETE FROM persistence_followed_items WHERE {_AMONG}".encode(), self._args(keys)
            )
            if brought := [change.after for change in changes if change.after is not None]:
                columns = [list(column) for column in zip(*brought, strict=True)]
                cursor.execute(_NOTE.encode(), [self._run_id, *columns])

    def count(self) -> int:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        return count_items(self._sink, self._run_id)

    def strays(self) -> list[Key]:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        return [(prefix, key) for prefix, key in self._sink.query(_STRAYS, [self._run_id])]

    def _claims_of(
        self, cursor: Cursor[tuple[Any, ...]], keys: Sequence[Key], suffix: str = ""
    ) -> dict[Key, ItemClaim]:
        # A key that Postgres cannot hold was never brought.
        held = [key for key in keys if "\0" not in key[0] + key[1]]
        query = f"SELECT {CLAIM} FROM persistence_followed_items WHERE {_AMONG} {suffix}"
        rows = cursor.execute(query.encode(), self._args(held)).fetchall()
        return {(row[0], row[1]): claim_of(row) for row in rows}

    def _args(self, keys: Sequence[Key]) -> list[object]:
        return [self._run_id, [key[0] for key in keys], [key[1] for key in keys]]
