"""LangGraph's store in a Postgres database that goes on changing.

A stamp holds the number of the transaction that wrote an item's row, and those of its vectors, as the stamps
of threads do (:mod:`persistence.backends.postgres.transfer_live`). It shows every change: there is no watch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from persistence.backends.postgres import seal
from persistence.backends.postgres.transfer_store import PostgresStoreSource, held_items
from persistence.transfer.items import BadItem, Item, Key
from persistence.transfer.live_store import ItemStamp

_STAMPS = """
SELECT prefix, key, hash_record_extended(line, 0) || '.' || hash_record_extended(line, 1), size
FROM (
    SELECT s.prefix, s.key,
        ROW(s.xmin, s.created_at, s.updated_at, {ttl}, pg_column_size(s.value), v.digest) AS line,
        4 * pg_column_size(s.value) + coalesce(v.size, 0) AS size
    FROM store s LEFT JOIN ({vectors}) AS v ON v.prefix = s.prefix AND v.key = s.key
) AS each_item
ORDER BY prefix COLLATE "C", key COLLATE "C"
"""
# The sums of two hashes of each row: they need no order.
_VECTORS = """
SELECT prefix, key, sum(pg_column_size(embedding)) AS size,
    sum(hash_record_extended(line, 0)) || '.' || sum(hash_record_extended(line, 1)) AS digest
FROM (
    SELECT prefix, key, embedding,
        ROW(xmin, field_name, created_at, updated_at, pg_column_size(embedding)) AS line
    FROM store_vectors
) AS each_vector
GROUP BY prefix, key
"""
_NO_VECTORS = "SELECT NULL AS prefix, NULL AS key, 0 AS size, NULL AS digest"


class PostgresLiveStore(PostgresStoreSource):
    """The store within one state of a database; see :class:`persistence.transfer.live_store.LiveStore`."""

    def stamps(self) -> Iterator[ItemStamp]:
        """See :class:`persistence.transfer.live_store.LiveStore`."""
        if not self._layout.has_items:
            return
        ttl = "s.expires_at, s.ttl_minutes" if self._layout.has_ttl else "NULL::timestamptz, NULL::int"
        vectors = _NO_VECTORS if self._layout.vector_type is None else _VECTORS
        with self._source.errors():
            statement = _STAMPS.format(ttl=ttl, vectors=vectors)
            for prefix, key, text, size in self._source.cursors.each("item_stamps", statement):
                yield ItemStamp(prefix, key, text, int(size))

    def some(self, keys: Sequence[Key]) -> Mapping[Key, Item | BadItem]:
        """See :class:`persistence.transfer.live_store.LiveStore`."""
        with self._source.errors():
            return held_items(self._conn, keys, self._layout)

    def seal(self, target: str) -> None:
        """See :class:`persistence.transfer.live_store.LiveStore`."""
        self._source.cursors.close()
        seal.seal_store(self._conn, self._schema, target)
