"""The store of a SQLite file as a target that is kept equal to a source, item by item."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from persistence.backends.sqlite.transfer_store import delete_item, held_items, layout_of, moment_of, put_item
from persistence.transfer.canonical import NotCanonicalError
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
    from persistence.backends.sqlite.transfer_sink import SqliteSink

_SHOWN = 3
_THIS = "run_id = ? AND prefix = ? AND key = ?"
_NOTE = f"INSERT INTO persistence_followed_items (run_id, {CLAIM}) VALUES (?, ?, ?, ?, ?, ?, ?)"
_ALL = """
SELECT f.prefix, f.key, f.stamp, f.mark, f.updated_at, f.expires_at, s.prefix IS NOT NULL, s.updated_at
FROM persistence_followed_items f LEFT JOIN store s ON s.prefix = f.prefix AND s.key = f.key
WHERE f.run_id = ?
"""


class SqliteStoreFollower:
    """The items that one run has brought; see :class:`persistence.transfer.live_store.StoreFollower`."""

    def __init__(self, sink: SqliteSink, run_id: str) -> None:
        self._sink = sink
        self._run_id = run_id

    def claims(self, after: Key | None, limit: int) -> list[ItemClaim]:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        return claimed_items(self._sink, self._run_id, after, limit)

    def claims_of(self, keys: Sequence[Key]) -> Mapping[Key, ItemClaim]:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        with self._sink.errors(), self._sink.reader() as conn:
            return self._claims_of(conn, keys)

    def apply(self, changes: Sequence[ItemChange]) -> None:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        with self._sink.transaction() as conn:
            keys = [change.key for change in changes]
            claims, held = self._claims_of(conn, keys), held_items(conn, keys)
            has_vectors = layout_of(conn).vectors
            for change in changes:
                require_ours(change, claims.get(change.key), held.get(change.key), self._sink.label)
                if change.writes:
                    delete_item(conn, change.key, has_vectors=has_vectors)
                if change.item is not None:
                    put_item(conn, change.item)
                conn.execute(
                    f"DELETE FROM persistence_followed_items WHERE {_THIS}", (self._run_id, *change.key)
                )
                if change.after is not None:
                    conn.execute(_NOTE, (self._run_id, *change.after))

    def count(self) -> int:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        return count_items(self._sink, self._run_id)

    def strays(self) -> list[Key]:
        """See :class:`persistence.transfer.live_store.StoreFollower`."""
        with self._sink.errors(), self._sink.reader() as conn:
            return list(islice(self._strays(conn), _SHOWN))

    def _strays(self, conn: sqlite3.Connection) -> Iterator[Key]:
        for *columns, is_there, updated_at in conn.execute(_ALL, (self._run_id,)):
            claim = claim_of(columns)
            if not (_is_at(claim.updated_at, updated_at) if is_there else claim.has_expired):
                yield claim[:2]

    def _claims_of(self, conn: sqlite3.Connection, keys: Sequence[Key]) -> dict[Key, ItemClaim]:
        query = f"SELECT {CLAIM} FROM persistence_followed_items WHERE {_THIS}"
        return {
            key: claim_of(row) for key in keys for row in conn.execute(query, (self._run_id, *key)).fetchall()
        }


def _is_at(moment: int | None, stored: object) -> bool:
    try:
        return moment_of(stored) == moment
    except NotCanonicalError:
        return False
