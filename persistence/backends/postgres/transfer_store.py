"""LangGraph's store in Postgres as a side of a transfer.

Row formats: ``langgraph-checkpoint-postgres`` 3.2.0, and pgvector's binary form: the number of
dimensions and two unused bytes, then the numbers in big-endian order, as float32 in a ``vector`` and as
float16 in a ``halfvec``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg.rows import tuple_row

from persistence.backends.postgres.copying import (
    HEADER,
    MOMENTS,
    NULL,
    TRAILER,
    binary,
    fields,
    jsonb,
    length,
    text,
    timestamp,
)
from persistence.backends.postgres.transfer_cursors import Query
from persistence.errors import TransferError
from persistence.transfer.canonical import NotCanonicalError, canonical_json, has_nul
from persistence.transfer.items import (
    BadItem,
    Item,
    ItemBatch,
    Key,
    Row,
    Rule,
    Vector,
    assembled,
    minutes,
)
from persistence.transfer.keys import pack_items, unchanged
from persistence.transfer.preflight import ItemFindings

if TYPE_CHECKING:
    from psycopg import Connection, Cursor

    from persistence.backends.postgres.transfer_sink import PostgresSink
    from persistence.backends.postgres.transfer_source import PostgresSource

_KEY_BYTES = 2_600  # see transfer_preflight
_JSON_BYTES = 200_000_000
_INT4 = range(-(2**31), 2**31)
_TOO_FAR = "a timestamp is infinite, or too far away"
_NO_VECTORS = (
    "vectors cannot be kept, as the table store_vectors of pgvector is not there: have a store with an index"
    " set it up, or leave them out (--without-vectors)"
)
_FORMS = {"vector": (4, "f"), "halfvec": (2, "e")}
"""Bytes and letter of one number of pgvector's types."""

_CATALOGUE = """
SELECT c.relname::text, t.typname::text, a.atttypmod, pg_catalog.has_table_privilege(c.oid, 'SELECT')
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped
     AND a.attname = CASE c.relname WHEN 'store' THEN 'ttl_minutes' ELSE 'embedding' END
LEFT JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
WHERE c.relkind IN ('r', 'p') AND c.relname IN ('store', 'store_vectors')
  AND CASE WHEN %(schema)s::text IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
           ELSE n.nspname = %(schema)s END
"""
_AMONG = "(prefix, key) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
_PUT_ITEMS = (
    "COPY store (prefix, key, value, created_at, updated_at, expires_at, ttl_minutes)"
    " FROM STDIN (FORMAT BINARY)"
)
_PUT_VECTORS = (
    "COPY store_vectors (prefix, key, field_name, embedding, created_at, updated_at)"
    " FROM STDIN (FORMAT BINARY)"
)


def _near(column: str) -> str:
    return (
        f"{column} > '-infinity' AND {column} < '294247-01-01 00:00+00'"  # what 64 bits of microseconds hold
    )


def _micros(column: str) -> str:
    return f"CASE WHEN {_near(column)} THEN (extract(epoch FROM {column}) * 1000000)::bigint END"


def _far(*columns: str) -> str:
    return f"coalesce(NOT ({' AND '.join(map(_near, columns))}), false)"


_ORDER = 'ORDER BY prefix COLLATE "C", key COLLATE "C"'
_ITEMS = Query(
    "store",
    f"prefix, key, value::text, {_micros('created_at')}, {_micros('updated_at')}, {_micros('expires_at')},"
    f" ttl_minutes, {_far('created_at', 'updated_at', 'expires_at')}",
    "",
    "4 * pg_column_size(value)",
    f"FROM store WHERE true {{where}} {_ORDER}",
)
_OLD_ITEMS = _ITEMS._replace(
    columns=f"prefix, key, value::text, {_micros('created_at')}, {_micros('updated_at')}, NULL, NULL,"
    f" {_far('created_at', 'updated_at')}"
)
_VECTORS = Query(
    "store_vectors",
    f"prefix, key, field_name, embedding, {_micros('created_at')}, {_micros('updated_at')},"
    f" {_far('created_at', 'updated_at')}",
    "",
    "pg_column_size(embedding)",
    f'FROM store_vectors WHERE true {{where}} {_ORDER}, field_name COLLATE "C"',
)


class _Layout(NamedTuple):
    """What tables the store has."""

    has_items: bool
    may_count: bool
    has_ttl: bool
    vector_type: str | None
    dims: int | None
    """How many dimensions each vector must have, if that is fixed."""

    @property
    def items(self) -> Query:
        return _ITEMS if self.has_ttl else _OLD_ITEMS


def _layout(conn: Connection[Any], schema: str | None) -> _Layout:
    cursor = conn.cursor(row_factory=tuple_row)
    rows = cursor.execute(_CATALOGUE.encode(), {"schema": schema}).fetchall()
    found = {name: (type_, modifier) for name, type_, modifier, _ in rows}
    type_, modifier = found.get("store_vectors", (None, None))
    return _Layout(
        has_items="store" in found,
        may_count=("store", True) in {(name, allowed) for name, _, _, allowed in rows},
        has_ttl=found.get("store", (None, None))[0] is not None,
        vector_type=type_,
        dims=modifier if modifier is not None and modifier > 0 else None,
    )


def held_items(
    conn: Connection[Any], keys: Sequence[Key], layout: _Layout, *, lock: bool = False
) -> dict[Key, Item | BadItem]:
    """Those of these items that are there."""
    keys = [key for key in keys if "\0" not in key[0] + key[1]]
    if not layout.has_items or not keys:
        return {}

    def rows(query: Query, suffix: str = "") -> Iterator[Row]:
        where = query.rest.format(where=f"AND {_AMONG}")
        cursor = conn.cursor(binary=True, row_factory=tuple_row)
        return iter(cursor.execute(f"SELECT {query.columns} {where} {suffix}".encode(), _arrays(keys)))

    items = rows(layout.items, "FOR UPDATE" if lock else "")
    vectors = rows(_VECTORS) if layout.vector_type is not None else iter(())
    return {item[:2]: item for item in assembled(items, vectors, _item, _vectors_of(layout))}


class PostgresStoreSource:
    """The store within a snapshot of a Postgres database."""

    def __init__(self, source: PostgresSource, conn: Connection[Any], schema: str | None) -> None:
        self._source = source
        self._conn = conn
        self._schema = schema
        with source.errors():
            self._layout = _layout(conn, schema)

    def count(self) -> int:
        """See :class:`persistence.transfer.items.StoreSource`; none, of a store that may not be read."""
        if not self._layout.may_count:
            return 0
        with self._source.errors():
            cursor = self._conn.cursor(row_factory=tuple_row)
            return int(cursor.execute("SELECT count(*) FROM store").fetchall()[0][0])

    def items(self) -> Iterator[Item | BadItem]:
        """See :class:`persistence.transfer.items.StoreSource`."""
        if not self._layout.has_items:
            return
        with self._source.errors():
            vectors: Iterator[Row] = iter(())
            if self._layout.vector_type is not None:
                vectors = self._source.rows(_VECTORS)
            yield from assembled(
                self._source.rows(self._layout.items), vectors, _item, _vectors_of(self._layout)
            )


class PostgresStoreSink:
    """The store of a Postgres database that a transfer writes to."""

    def __init__(self, sink: PostgresSink, conn: Connection[Any], schema: str | None) -> None:
        self._sink = sink
        self._conn = conn
        self._schema = schema

    def preflight(self) -> PostgresItemPreflight:
        """See :class:`persistence.transfer.items.StoreSink`."""
        return PostgresItemPreflight(self._look())

    def prepare(self) -> None:
        """The table of vectors needs pgvector and a number of dimensions, so only a store makes it."""

    def held(self, keys: Sequence[Key]) -> Mapping[Key, Item | BadItem]:
        """See :class:`persistence.transfer.items.StoreSink`."""
        with self._sink.errors():
            return held_items(self._conn, keys, self._look())

    def write(self, batch: ItemBatch, rule: Rule) -> None:
        """See :class:`persistence.transfer.items.StoreSink`."""
        layout = self._look()
        with self._sink.errors(), self._conn.transaction():
            held = held_items(self._conn, [item[:2] for item in batch.items], layout, lock=True)
            chosen = rule.chosen(batch.items, held)
            cursor = self._conn.cursor()
            _replace(cursor, [item[:2] for item in chosen if item[:2] in held], chosen, layout)
            self._sink.enter(cursor, batch.entry, pack_items(chosen))

    def locked(self, keys: Sequence[Key]) -> dict[Key, Item | BadItem]:
        """As :meth:`held`, and nobody else changes them before the end of the transaction that is open."""
        return held_items(self._conn, keys, self._look(), lock=True)

    def replace(self, gone: Sequence[Key], items: Sequence[Item]) -> None:
        """Delete items, then write others, in the transaction that is open."""
        _replace(self._conn.cursor(), gone, items, self._look())

    def remove(self, marks: Mapping[Key, bytes]) -> tuple[int, int]:
        """See :class:`persistence.transfer.items.StoreSink`."""
        with self._sink.errors(), self._conn.transaction():
            held = held_items(self._conn, list(marks), self._look(), lock=True)
            going = unchanged(held, marks)
            self._conn.execute(f"DELETE FROM store WHERE {_AMONG}".encode(), _arrays(going))
            return len(going), len(held) - len(going)

    def _look(self) -> _Layout:
        with self._sink.errors():
            return _layout(self._conn, self._schema)


class PostgresItemPreflight(ItemFindings):
    """Looks at every item of a transfer."""

    def __init__(self, layout: _Layout) -> None:
        super().__init__()
        self._layout = layout

    def see_item(self, item: Item | BadItem) -> None:
        """Note what of this item Postgres cannot hold."""
        super().see_item(item)
        if isinstance(item, BadItem):
            return
        names = (item.prefix, item.key, *(vector.field for vector in item.vectors))
        if has_nul(item.value) or any("\0" in name for name in names):
            self.note_item("the item holds the NUL character, which Postgres cannot store", item)
        if len("".join(names[:2]).encode()) + max([0, *(len(n.encode()) for n in names[2:])]) > _KEY_BYTES:
            self.note_item(f"ids of more than {_KEY_BYTES} bytes do not fit a Postgres index", item)
        if len(item.value) > _JSON_BYTES:
            self.note_item("the value is too large for JSONB", item)
        ttl = item.ttl_minutes
        if ttl is not None and (not ttl.is_integer() or int(ttl) not in _INT4):
            self.note_item("the TTL is no whole number of minutes, and Postgres keeps only such", item)
        moments = [item.created_at, item.updated_at, item.expires_at]
        for vector in item.vectors:
            moments += vector[2:]
            if (reason := self._unfit(vector)) is not None:
                self.note_item(reason, item)
        if any(moment is not None and moment not in MOMENTS for moment in moments):
            self.note_item("a timestamp is outside what Postgres can hold", item)

    def _unfit(self, vector: Vector) -> str | None:
        """Why the target's column cannot hold a vector."""
        if self._layout.vector_type is None:
            return _NO_VECTORS
        if self._layout.dims not in (None, vector.dims):
            return f"a vector has {vector.dims} dimensions, the target's column {self._layout.dims}"
        if not all(map(math.isfinite, vector.floats())):
            return "a vector holds a number that is not finite, which pgvector refuses"
        if self._layout.vector_type not in _FORMS:
            return f"the target's vectors have the type {self._layout.vector_type}, which is not supported"
        if not _fits(vector, self._layout.vector_type):
            return f"a vector does not fit the precision of the target's {self._layout.vector_type}"
        return None


def _arrays(keys: Sequence[Key]) -> list[list[str]]:
    return [[key[0] for key in keys], [key[1] for key in keys]]


def _item(row: Row) -> Item:
    prefix, key, value, created_at, updated_at, expires_at, ttl, far = row
    if far:
        raise NotCanonicalError(_TOO_FAR)
    return Item(prefix, key, canonical_json(value), created_at, updated_at, expires_at, minutes(ttl))


def _vectors_of(layout: _Layout) -> Callable[[Row], Vector]:
    def vector(row: Row) -> Vector:
        field, embedding, created_at, updated_at, far = row
        if far:
            raise NotCanonicalError(_TOO_FAR)
        if embedding is None:
            raise NotCanonicalError("a vector is empty")
        if layout.vector_type not in _FORMS:
            raise NotCanonicalError(f"a vector has the type {layout.vector_type}, which is not supported")
        return Vector(field, _unpacked(embedding, layout.vector_type), created_at, updated_at)

    return vector


def _packed(vector: Vector, type_: str | None) -> bytes:
    """Pgvector's binary form."""
    if type_ not in _FORMS:  # the preflight has refused these
        raise TransferError(f"a vector has no form as {type_}")
    _, letter = _FORMS[type_]
    return struct.pack(f"!HH{vector.dims}{letter}", vector.dims, 0, *vector.floats())


def _fits(vector: Vector, type_: str) -> bool:
    """Whether the type gives back the very numbers: float16 holds fewer."""
    try:
        return _unpacked(_packed(vector, type_), type_) == vector.embedding
    except OverflowError:
        return False


def _unpacked(data: bytes, type_: str) -> bytes:
    """float32 in little-endian order from pgvector's binary form."""
    size, letter = _FORMS[type_]
    count = (len(data) - 4) // size
    return struct.pack(f"<{count}f", *struct.unpack_from(f"!{count}{letter}", data, 4))


def _item_row(item: Item) -> list[bytes]:
    ttl = (NULL,) if item.ttl_minutes is None else binary(length(int(item.ttl_minutes)))
    moments = map(timestamp, (item.created_at, item.updated_at, item.expires_at))
    return [fields(7), *text(item.prefix), *text(item.key), *jsonb(item.value), *moments, *ttl]


def _vector_row(item: Item, vector: Vector, pack: Callable[[Vector], bytes]) -> list[bytes]:
    return [
        fields(6),
        *text(item.prefix),
        *text(item.key),
        *text(vector.field),
        *binary(pack(vector)),
        timestamp(vector.created_at),
        timestamp(vector.updated_at),
    ]


def _replace(cursor: Cursor[Any], gone: Sequence[Key], items: Sequence[Item], layout: _Layout) -> None:
    if gone:  # the vectors go with them, by their foreign key
        cursor.execute(f"DELETE FROM store WHERE {_AMONG}".encode(), _arrays(gone))
    _copy(cursor, _PUT_ITEMS, [part for item in items for part in _item_row(item)])
    pack = partial(_packed, type_=layout.vector_type)
    vectors = [part for i in items for v in i.vectors for part in _vector_row(i, v, pack)]
    _copy(cursor, _PUT_VECTORS, vectors)


def _copy(cursor: Cursor[Any], statement: str, parts: list[bytes]) -> None:
    if parts:
        with cursor.copy(statement.encode()) as copy:
            copy.write(b"".join((HEADER, *parts, TRAILER)))
