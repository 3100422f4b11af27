"""LangGraph's store in a SQLite file that goes on changing.

A stamp holds an item's rowid, which is another one whenever the item is put, unless the newest items had been
deleted before; its moments and the beginnings of its value and vectors show most of the rest. What is left, a
value of the same beginning and length in the same second, the comparison of a cut-over finds.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from persistence.backends.sqlite import seal
from persistence.backends.sqlite.transfer_store import SqliteStoreSource, held_items, layout_of
from persistence.errors import SourceError
from persistence.transfer.items import BadItem, Item, Key, Row
from persistence.transfer.live_store import ItemStamp

_STAMPS = """
SELECT prefix, key, length(value), rowid, created_at, updated_at, {ttl}, substr(value, 1, 64) FROM store
"""
_VECTORS = """
SELECT prefix, key, length(embedding), rowid, field_name, created_at, updated_at, substr(embedding, 1, 16)
FROM store_vectors
"""
_THIS = "WHERE prefix = ? AND key = ?"


class SqliteLiveStore(SqliteStoreSource):
    """The store within one state of a file; see :class:`persistence.transfer.live_store.WatchedStore`."""

    def __init__(
        self, conn: sqlite3.Connection, label: str, reading: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__(conn, reading)
        self._label = label

    def stamps(self) -> Iterator[ItemStamp]:
        """See :class:`persistence.transfer.live_store.LiveStore`."""
        return self._stamps("", ())

    def stamps_of(self, keys: Sequence[Key]) -> Mapping[Key, ItemStamp]:
        """See :class:`persistence.transfer.live_store.LiveStore`."""
        return {key: stamp for key in keys for stamp in self._stamps(_THIS, key)}

    def some(self, keys: Sequence[Key]) -> Mapping[Key, Item | BadItem]:
        """See :class:`persistence.transfer.live_store.LiveStore`."""
        with self._reading():
            return held_items(self._conn, keys)

    def noted(self, after: int) -> tuple[set[Key], int]:
        """See :class:`persistence.transfer.live_store.LiveStore`; nobody writes to a sealed store."""
        with self._reading():
            return seal.noted_items(self._conn, after, self._label)

    def seal(self, target: str) -> None:
        """See :class:`persistence.transfer.live_store.LiveStore`."""
        seal.seal_store(self._conn, target)

    def _stamps(self, where: str, args: Sequence[str]) -> Iterator[ItemStamp]:
        with self._reading():
            layout = layout_of(self._conn)
            if not layout.items:
                return
            ttl = "expires_at, ttl_minutes" if layout.ttl else "NULL, NULL"
            rows = self._conn.execute(f"{_STAMPS.format(ttl=ttl)} {where} ORDER BY prefix, key", args)
            vectors: Iterator[Row] = iter(())
            if layout.vectors:
                vectors = self._conn.execute(f"{_VECTORS} {where} ORDER BY prefix, key, field_name", args)
            following = next(vectors, None)
            for prefix, key, size, *marks in rows:
                if not isinstance(prefix, str) or not isinstance(key, str):
                    raise SourceError(f"the store of {self._label} has a namespace or key that is not text")
                while following is not None and following[:2] <= (prefix, key):
                    if following[:2] == (prefix, key):
                        marks.append(following[2:])
                        size = (size or 0) + (following[2] or 0)
                    following = next(vectors, None)
                digest = hashlib.sha256(repr((size, *marks)).encode()).hexdigest()[:32]
                yield ItemStamp(prefix, key, digest, size or 0)
