"""LangGraph's store in SQLite as a side of a transfer.

Row formats: ``langgraph-checkpoint-sqlite`` 3.1.2. A value is JSON as a BLOB, a moment is text in UTC,
with a zone or without, an embedding is float32 in little-endian order.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from persistence.transfer.canonical import NotCanonicalError, canonical_json, decode_json
from persistence.transfer.items import (
    BadItem,
    Item,
    ItemBatch,
    Key,
    Row,
    Rule,
    Vector,
    assembled,
    microseconds,
    minutes,
    moment,
)
from persistence.transfer.keys import pack_items, unchanged
from persistence.transfer.preflight import ItemFindings

if TYPE_CHECKING:
    from persistence.backends.sqlite.transfer_sink import SqliteSink

_ITEMS = "SELECT prefix, key, value, created_at, updated_at, {ttl} FROM store"
_TTL = "expires_at, ttl_minutes"
_VECTORS = "SELECT prefix, key, field_name, embedding, created_at, updated_at FROM store_vectors"
_KEYS_ARE_TEXT = "typeof(prefix) = 'text' AND typeof(key) = 'text'"
_THIS_KEY = "prefix = ? AND key = ?"
_PUT_ITEM = (
    "INSERT INTO store (prefix, key, value, created_at, updated_at, expires_at, ttl_minutes)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_PUT_VECTOR = (
    "INSERT INTO store_vectors (prefix, key, field_name, embedding, created_at, updated_at)"
    " VALUES (?, ?, ?, ?, ?, ?)"
)
_ROW_BYTES = 1_000_000_000
_INTEGERS = range(-(2**63), 2**64)
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


class SqliteStoreSource:
    """The store within a snapshot of a SQLite file."""

    def __init__(self, conn: sqlite3.Connection, reading: Callable[[], AbstractContextManager[None]]) -> None:
        self._conn = conn
        self._reading = reading

    def count(self) -> int:
        """See :class:`persistence.transfer.items.StoreSource`."""
        with self._reading():
            if not layout_of(self._conn).items:
                return 0
            return int(self._conn.execute("SELECT count(*) FROM store").fetchone()[0])

    def items(self) -> Iterator[Item | BadItem]:
        """See :class:`persistence.transfer.items.StoreSource`."""
        with self._reading():
            if (layout := layout_of(self._conn)).items:
                yield from self._others()
                yield from _read(self._conn, layout, _KEYS_ARE_TEXT)

    def _others(self) -> Iterator[BadItem]:
        for prefix, key in self._conn.execute(f"SELECT prefix, key FROM store WHERE NOT ({_KEYS_ARE_TEXT})"):
            yield BadItem(str(prefix), str(key), "the namespace or key is not stored as text")


class SqliteStoreSink:
    """The store of a SQLite file that a transfer writes to."""

    def __init__(self, sink: SqliteSink) -> None:
        self._sink = sink

    def preflight(self) -> SqliteItemPreflight:
        """See :class:`persistence.transfer.items.StoreSink`."""
        return SqliteItemPreflight()

    def prepare(self) -> None:
        """As the setup of a store with an index does, which needs an extension only to search."""
        from langgraph.store.sqlite import SqliteStore

        with self._sink.transaction() as conn:
            conn.execute("CREATE TABLE IF NOT EXISTS vector_migrations (v INTEGER PRIMARY KEY)")
            for number, statement in enumerate(SqliteStore.VECTOR_MIGRATIONS):
                done = "SELECT 1 FROM vector_migrations WHERE v = ?"
                if conn.execute(done, (number,)).fetchone() is None:
                    conn.execute(statement)
                    conn.execute("INSERT INTO vector_migrations (v) VALUES (?)", (number,))

    def held(self, keys: Sequence[Key]) -> Mapping[Key, Item | BadItem]:
        """See :class:`persistence.transfer.items.StoreSink`."""
        with self._sink.reading() as conn:
            return held_items(conn, keys) if conn is not None and layout_of(conn).items else {}

    def write(self, batch: ItemBatch, rule: Rule) -> None:
        """See :class:`persistence.transfer.items.StoreSink`."""
        with self._sink.transaction() as conn:
            held = held_items(conn, [item[:2] for item in batch.items])
            has_vectors = layout_of(conn).vectors
            chosen = rule.chosen(batch.items, held)
            for item in chosen:
                delete_item(conn, item[:2], has_vectors=has_vectors)
                put_item(conn, item)
            self._sink.enter(conn, batch.entry, pack_items(chosen))

    def remove(self, marks: Mapping[Key, bytes]) -> tuple[int, int]:
        """See :class:`persistence.transfer.items.StoreSink`."""
        with self._sink.transaction() as conn:
            held = held_items(conn, list(marks))
            has_vectors = layout_of(conn).vectors
            for key in (going := unchanged(held, marks)):
                delete_item(conn, key, has_vectors=has_vectors)
            return len(going), len(held) - len(going)


class SqliteItemPreflight(ItemFindings):
    """Looks at every item of a transfer."""

    def see_item(self, item: Item | BadItem) -> None:
        """Note what of this item SQLite cannot hold."""
        super().see_item(item)
        if isinstance(item, BadItem):
            return
        if len(item.value) > _ROW_BYTES or any(len(v.embedding) > _ROW_BYTES for v in item.vectors):
            self.note_item("the value is larger than a SQLite row can be", item)
        if _LONG_NUMBER.search(item.value) and _has_large_integer(decode_json(item.value)):
            self.note_item("LangGraph's SQLite store reads an integer of more than 64 bits as a float", item)
        moments = [item.created_at, item.updated_at, item.expires_at]
        for vector in item.vectors:
            moments += vector[2:]
        try:
            for value in moments:
                _text(value)
        except OverflowError:
            self.note_item("a timestamp is outside the years 1 to 9999", item)


class Layout(NamedTuple):
    """What tables and columns the store has; those of early versions had no time to live."""

    items: bool
    ttl: bool
    vectors: bool


def layout_of(conn: sqlite3.Connection) -> Layout:
    """What is there of a store."""
    columns = {row[1] for row in conn.execute("PRAGMA table_info(store)")}
    return Layout(bool(columns), "ttl_minutes" in columns, has_table(conn, "store_vectors"))


def has_table(conn: sqlite3.Connection, name: str) -> bool:
    """Whether the database has a table of this name."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return conn.execute(query, (name,)).fetchone() is not None


def put_item(conn: sqlite3.Connection, item: Item) -> None:
    """Store an item that is not there, with its vectors."""
    conn.execute(_PUT_ITEM, _item_row(item))
    for vector in item.vectors:
        conn.execute(_PUT_VECTOR, _vector_row(item, vector))


def delete_item(conn: sqlite3.Connection, key: Key, *, has_vectors: bool) -> None:
    """Delete an item with its vectors, where the store has a table for these."""
    conn.execute(f"DELETE FROM store WHERE {_THIS_KEY}", key)
    if has_vectors:  # also those that an item which is gone has left
        conn.execute(f"DELETE FROM store_vectors WHERE {_THIS_KEY}", key)


def held_items(conn: sqlite3.Connection, keys: Sequence[Key]) -> dict[Key, Item | BadItem]:
    """Those of these items that are there."""
    layout = layout_of(conn)
    return {item[:2]: item for key in keys for item in _read(conn, layout, _THIS_KEY, key)}


def _read(
    conn: sqlite3.Connection, layout: Layout, where: str, args: Sequence[str] = ()
) -> Iterator[Item | BadItem]:
    ttl = _TTL if layout.ttl else "NULL, NULL"
    rows = conn.execute(f"{_ITEMS.format(ttl=ttl)} WHERE {where} ORDER BY prefix, key", args)
    vectors: Iterator[Row] = iter(())
    if layout.vectors:
        vectors = conn.execute(f"{_VECTORS} WHERE {where} ORDER BY prefix, key, field_name", args)
    return assembled(rows, vectors, _item, _vector)


def _item(row: Row) -> Item:
    prefix, key, value, created_at, updated_at, expires_at, ttl = row
    if not isinstance(value, bytes | str):
        raise NotCanonicalError(f"the value is stored as {type(value).__name__}, not as JSON")
    try:
        json = canonical_json(value)
    except NotCanonicalError as error:
        raise NotCanonicalError(f"the value is not JSON: {error}") from None
    return Item(
        prefix, key, json, moment_of(created_at), moment_of(updated_at), moment_of(expires_at), minutes(ttl)
    )


def _vector(row: Row) -> Vector:
    field, embedding, created_at, updated_at = row
    if not isinstance(field, str):
        raise NotCanonicalError("the field of a vector is not stored as text")
    if not isinstance(embedding, bytes) or not embedding or len(embedding) % 4:
        raise NotCanonicalError("a vector does not consist of float32 numbers")
    return Vector(field, embedding, moment_of(created_at), moment_of(updated_at))


def moment_of(text: object) -> int | None:
    """A moment as it is stored. SQLite's own clock gives UTC and names no zone; what Python wrote names one.

    Raises:
        NotCanonicalError: It is something else.
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        found = None
    if found is None:
        raise NotCanonicalError(f"a timestamp is not one: {text!r}")
    return microseconds(found if found.tzinfo is not None else found.replace(tzinfo=UTC))


def _text(value: int | None) -> str | None:
    """As CURRENT_TIMESTAMP spells it, with a fraction only where there is one; so text sorts by time."""
    return None if value is None else moment(value).replace(tzinfo=None).isoformat(" ")


def _item_row(item: Item) -> tuple[object, ...]:
    # The store's own put() gives this column the zone's name, and compares it with one that has none.
    expires_at = None if item.expires_at is None else moment(item.expires_at).isoformat(" ")
    moments = (_text(item.created_at), _text(item.updated_at), expires_at)
    return (*item[:3], *moments, item.ttl_minutes)


def _vector_row(item: Item, vector: Vector) -> tuple[object, ...]:
    return (*item[:2], *vector[:2], _text(vector.created_at), _text(vector.updated_at))


def _has_large_integer(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_large_integer, value.values()))
    if isinstance(value, list):
        return any(map(_has_large_integer, value))
    return isinstance(value, int) and value not in _INTEGERS
