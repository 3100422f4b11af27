"""Postgres as the source of a transfer, and as the side that a verification asks for its hashes.

Row formats: ``langgraph-checkpoint-postgres`` 3.2.0. Scalars stand in the checkpoint's JSONB, every other
value in ``checkpoint_blobs`` under its channel's version; a blob wins over a scalar, and a marker of
our own savers (see ``persistence.backends.postgres.markers``) over a blob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import lru_cache, partial
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Self

import msgspec
import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from persistence import schema
from persistence.backends.postgres.connection import (
    connect,
    database_identity,
    lift_time_limits,
    translate,
)
from persistence.backends.postgres.markers import is_marker, unmark
from persistence.backends.postgres.transfer_cursors import Cursors, Cut, Query, Row, Where
from persistence.errors import SchemaError, SourceError
from persistence.transfer.canonical import (
    NotCanonicalError,
    canonical_json,
    canonical_value,
    content_hash,
    decode_json,
    is_delta,
    json_value,
    split_usual_json,
    version_text,
)
from persistence.transfer.formats import Formats
from persistence.transfer.records import Checkpoint, Record, Reject, Value, ValueRef, Write, make

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg import Connection, Cursor

    from persistence.backends.postgres.transfer_store import PostgresStoreSource
    from persistence.contract import Provider
    from persistence.transfer.semantic import Official
    from persistence.transfer.workers import Open

_THREADS_AT_ONCE = 5_000
_EVERYWHERE = Where()

# The hashes are computed in the database, so that checking a remote one does not carry its data over.
BLOBS = Query(
    "blobs",
    "thread_id, checkpoint_ns, channel, version, type, sha256(coalesce(blob, '')),"
    " substring(blob FROM 1 FOR 6), octet_length(blob), {data}",
    "blob",
    "octet_length(blob)",
    """FROM checkpoint_blobs WHERE type <> 'empty' {where}
ORDER BY thread_id COLLATE "C", checkpoint_ns COLLATE "C", channel COLLATE "C", version COLLATE "C"
""",
)
CHECKPOINTS = Query(
    "checkpoints",
    "thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint::text, metadata::text",
    "",
    # As text it is about as long as in binary, where that is not compressed.
    "pg_column_size(checkpoint) * CASE WHEN pg_column_compression(checkpoint) IS NULL THEN 1 ELSE 4 END"
    " + pg_column_size(metadata) * CASE WHEN pg_column_compression(metadata) IS NULL THEN 1 ELSE 4 END",
    """FROM checkpoints WHERE true {where}
ORDER BY thread_id COLLATE "C", checkpoint_ns COLLATE "C", checkpoint_id COLLATE "C"
""",
)
_WRITES = Query(
    "writes",
    "thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, sha256(blob), {data}",
    "blob",
    "octet_length(blob)",
    """FROM checkpoint_writes WHERE true {where}
ORDER BY thread_id COLLATE "C", checkpoint_ns COLLATE "C", checkpoint_id COLLATE "C",
         task_id COLLATE "C", idx
""",
)

_OLD_WRITES = _WRITES._replace(columns=_WRITES.columns.replace("task_path", "''::text"))
"""Of savers up to 2.0.8, where the column did not exist yet."""

_THREADS = """
SELECT thread_id FROM (SELECT thread_id FROM checkpoints UNION SELECT thread_id FROM checkpoint_writes) t
ORDER BY thread_id COLLATE "C"
"""


_OTHERS = """
SELECT EXISTS (SELECT 1 FROM checkpoint_blobs WHERE type <> 'empty' AND type <> ALL(%(plain)s))
    OR EXISTS (SELECT 1 FROM checkpoint_writes WHERE type IS NULL OR type <> ALL(%(plain)s))
"""

# What is set for the transaction is set on all machines of a distributed database, which it has open as long.
_DISTRIBUTED = """
SELECT set_config('citus.propagate_set_commands', 'local', true)
FROM pg_catalog.pg_extension WHERE extname = 'citus'
"""


class PostgresSource:
    """One consistent snapshot of a Postgres checkpoint database. A context manager."""

    divisible = True
    size = None
    _has_others: bool | None = None
    """Whether there are rows that the database cannot hash as they are, once that was looked for."""
    _has_path: bool | None = None
    """Whether writes have a task path, likewise."""

    def __init__(
        self, provider: Provider, snapshot: str | None = None, *, allow_pickle: bool = False
    ) -> None:
        self.label = str(provider.dsn)
        self._provider = provider
        self._snapshot = snapshot
        self._allow_pickle = allow_pickle
        self._formats = Formats(provider.settings, allow_pickle=allow_pickle)

    def __enter__(self) -> Self:
        with ExitStack() as stack, self.errors():
            conn = stack.enter_context(closing(connect(self._provider.dsn, self._provider.settings)))
            # One snapshot for all statements, and no limit of time while the other side is busy.
            conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            if self._snapshot is not None:
                name = sql.Literal(self._snapshot)
                conn.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(name))
            conn.execute(_DISTRIBUTED)
            lift_time_limits(conn.cursor())
            # Where a policy would hide rows, an error: what is not seen is neither moved nor compared.
            conn.execute("SET LOCAL row_security = off")
            self.cursors = Cursors(conn)
            self._stack = stack.pop_all()
        return self

    @classmethod
    def on(cls, conn: Connection[Any], label: str, formats: Formats) -> PostgresSource:
        """What a transaction of somebody else's sees."""
        source = cls.__new__(cls)
        source.label, source.cursors, source._formats = label, Cursors(conn), formats
        return source

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cursors.abandon()
        with suppress(psycopg.Error):  # nothing was written, and all was read that was wanted
            self.cursors.conn.rollback()
        self._stack.close()

    @property
    def conn(self) -> Connection[Any]:
        """The connection, with nothing under way on it."""
        self.cursors.settle()
        return self.cursors.conn

    def share(self) -> Open:
        """See :mod:`persistence.transfer.workers`; it lasts as long as this snapshot."""
        with self.errors():
            (name,) = self.cursor().execute("SELECT pg_export_snapshot()").fetchall()[0]
        return partial(PostgresSource, self._provider, name, allow_pickle=self._allow_pickle)

    @property
    def database(self) -> str:
        """See :class:`persistence.transfer.records.Source`."""
        with self.errors():
            return database_identity(self.conn)

    @property
    def encrypted(self) -> bool:
        """See :class:`persistence.transfer.records.Source`."""
        return self._formats.encrypts

    @property
    def converted(self) -> int:
        """See :class:`persistence.transfer.records.Source`."""
        return self._formats.converted

    def drift(self) -> list[str]:
        """See :class:`persistence.transfer.records.Source`; our own tables are no matter of it."""
        try:
            differences = schema.check(self._provider)
        except SchemaError as error:
            return [error.message]
        return [str(found) for found in differences if not found.table.startswith("persistence_")]

    @property
    def identity(self) -> str:
        """See :class:`persistence.transfer.records.Source`."""
        with self.errors():
            schema = self._provider.settings.db_schema
            if schema is None:
                schema = self.cursor().execute("SELECT current_schema()").fetchall()[0][0]
        return f"{self.database}/{schema}"

    @property
    def place(self) -> str:
        """See :class:`persistence.transfer.records.Source`."""
        return self.identity

    def marks(self, after: str | None, upto: str) -> list[int]:
        """See :class:`persistence.transfer.records.Source`. A row that is changed has another ``xmin``."""
        # No id here has the character NUL, so what stands before it has the same place in the order.
        between = {"upto": upto.split("\0")[0], "after": after if after is None else after.split("\0")[0]}
        found: list[int] = []
        with self.errors():
            for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
                statement = (
                    f"SELECT count(*), coalesce(sum(xmin::text::bigint), 0)::bigint FROM {table}"
                    ' WHERE thread_id COLLATE "C" <= %(upto)s'
                    ' AND (%(after)s::text IS NULL OR thread_id COLLATE "C" > %(after)s::text)'
                )
                found += self.cursor().execute(statement.encode(), between).fetchall()[0]
        return found

    def official(self) -> Official:
        """See :class:`persistence.transfer.records.Source`."""
        from persistence.backends.postgres.transfer_official import PostgresOfficial

        return PostgresOfficial(self.conn, self._provider.settings, self.errors)

    def threads(self) -> Iterator[str]:
        """See :class:`persistence.transfer.records.Source`. The server begins with them at once."""
        with self.errors():
            rows = self.cursors.each("threads", _THREADS)
        return self._ids(rows)

    def _ids(self, rows: Iterator[Row]) -> Iterator[str]:
        with self.errors():
            yield from (thread for (thread,) in rows)

    def count(self, threads: Sequence[str] | None = None) -> int:
        """See :class:`persistence.transfer.records.Source`."""
        counted = "SELECT count(*) FROM checkpoints"
        with self.errors():
            if threads is None:
                return int(self.cursor().execute(counted).fetchall()[0][0])
            each = (
                self.cursor().execute(f"{counted} WHERE thread_id = ANY(%s)".encode(), [some])
                for some in _held(threads)
            )
            return sum(rows.fetchall()[0][0] for rows in each)

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        """See :class:`persistence.transfer.records.Source`. The server begins with them at once."""
        if threads is None:
            return self._merged(self._asked(_EVERYWHERE, data=data), data=data)
        if not (some := _held(threads)):
            return iter(())
        first = self._merged(self._asked(_of_threads(some[0]), data=data), data=data)
        return chain(first, *(self._later(others, data=data) for others in some[1:]))

    def store(self) -> PostgresStoreSource:
        """See :class:`persistence.transfer.records.Source`."""
        from persistence.backends.postgres.transfer_store import PostgresStoreSource

        return PostgresStoreSource(self, self.conn, self._provider.settings.db_schema)

    def _later(self, threads: Sequence[str], *, data: bool) -> Iterator[Record]:
        """Those of some threads, asked for when they are wanted."""
        yield from self._merged(self._asked(_of_threads(threads), data=data), data=data)

    def _asked(self, where: Where, *, data: bool) -> list[Iterator[Row]]:
        """The rows of values, of checkpoints and of writes; the first ones are under way."""
        with self.errors():
            if not data and self._has_others is None:
                others = self.cursor().execute(_OTHERS, {"plain": list(self._formats.plain_types)})
                self._has_others = bool(others.fetchall()[0][0])
            queries = (BLOBS, CHECKPOINTS, self.writes())
            return self.cursors.asked(*(self._cut(query, where, data=data) for query in queries))

    def _merged(self, rows: Sequence[Iterator[Row]], *, data: bool) -> Iterator[Record]:
        """Rows of the three tables as records, in their order."""
        with self.errors():
            blobs, checkpoints, writes = Groups(rows[0], 2), Groups(rows[1], 2), Groups(rows[2], 1)
            while heads := [stream.key for stream in (blobs, checkpoints, writes) if stream.key]:
                thread = min(key[0] for key in heads)
                while heads := [s.key for s in (blobs, checkpoints) if s.key and s.key[0] == thread]:
                    ns = min(key[1] for key in heads)
                    yield from self.namespace(thread, ns, blobs, checkpoints, {}, data=data)
                yield from (self.write(row, data=data) for row in writes.take((thread,)))

    def namespace(
        self,
        thread: str,
        ns: str,
        blobs: Groups,
        checkpoints: Groups,
        held: dict[tuple[str, str | None], ValueRef | str],
        *,
        data: bool,
    ) -> Iterator[Record]:
        """The next rows as records, values first; ``held`` gets those, by channel and version."""
        # Values that no checkpoint can refer to are no content; a thread may have nothing else.
        data = data and checkpoints.key == (thread, ns)
        for _, _, channel, version, type_, digest, start, size, blob in blobs.take((thread, ns)):
            if type_ not in self._formats.plain_types:
                try:
                    type_, blob = self._formats.value(f"value of channel {channel!r}", type_, blob or b"")
                except NotCanonicalError as error:
                    held[channel, version] = str(error)
                    continue
                digest, start, size = hashlib.sha256(blob).digest(), blob[:6], len(blob)
            delta = type_ == "msgpack" and is_delta(start or b"")
            held[channel, version] = make(ValueRef, (channel, version, type_, digest, None, size or 0, delta))
            if data:
                yield Value(thread, ns, channel, version, type_, digest, blob or b"")
        for row in checkpoints.take((thread, ns)):
            try:
                yield checkpoint_of(row, held, self._formats)
            except NotCanonicalError as error:
                yield Reject(thread, ns, row[2], str(error), msgspec.msgpack.encode(row))

    def writes(self) -> Query:
        """The table of writes, as it is here."""
        if self._has_path is None:
            columns = self.cursor().execute("SELECT * FROM checkpoint_writes LIMIT 0").description or ()
            self._has_path = "task_path" in {column.name for column in columns}
        return _WRITES if self._has_path else _OLD_WRITES

    def write(self, row: Row, *, data: bool) -> Write | Reject:
        """A row of writes as a record."""
        if row[7] in self._formats.plain_types and row[8] is not None and (data or row[9] is None):
            return make(Write, row)
        thread, ns, checkpoint, *_, channel, type_, digest, blob = row
        if type_ not in self._formats.plain_types or digest is None:
            try:
                type_, blob = self._formats.value(f"write to channel {channel!r}", type_, blob)
            except NotCanonicalError as error:
                return Reject(thread, ns, checkpoint, str(error), msgspec.msgpack.encode(row))
            digest = hashlib.sha256(blob).digest()
        return make(Write, (*row[:7], type_, digest, blob if data else None))

    def rows(self, query: Query, where: Where = _EVERYWHERE, *, data: bool = True) -> Iterator[Row]:
        """All rows in order, some at a time; the first ones are under way."""
        return self.cursors.asked(self._cut(query, where, data=data))[0]

    def _cut(self, query: Query, where: Where, *, data: bool) -> Cut:
        """What to select, and whether the rows may be large."""
        data = data or self._has_others is True
        columns = query.columns.format(data=query.data if data else "NULL")
        return Cut(query, columns, where, sized=data or not query.data)

    def cursor(self) -> Cursor[tuple[Any, ...]]:
        """A cursor in the snapshot."""
        return self.conn.cursor(binary=True, row_factory=tuple_row)

    def errors(self) -> _ReadErrors:
        """A block in which the driver's errors become ours."""
        return _ReadErrors(self.label)


def _held(threads: Sequence[str]) -> list[list[str]]:
    """Ids, some at a time. A thread whose id Postgres cannot hold is not there."""
    held = [thread for thread in threads if "\0" not in thread]
    return [held[start : start + _THREADS_AT_ONCE] for start in range(0, len(held), _THREADS_AT_ONCE)]


def _of_threads(threads: Sequence[str]) -> Where:
    return Where("AND thread_id = ANY(%s)", (list(threads),))


class Groups:
    """Sorted rows in groups of those that begin with the same columns, with the next group in sight."""

    def __init__(self, rows: Iterator[Row], columns: int) -> None:
        self._groups = groupby(rows, itemgetter(slice(columns)))
        self.key: tuple[str, ...] | None
        self._rows: Iterator[Row]
        self._advance()

    def take(self, key: tuple[str, ...]) -> Iterator[Row]:
        """The rows that begin with this key, if they are next."""
        if self.key == key:
            yield from self._rows
            self._advance()

    def _advance(self) -> None:
        self.key, self._rows = next(self._groups, (None, iter(())))


class _ReadErrors:
    """A block in which the driver's errors become ours."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, psycopg.Error):
            ours = translate(error, self._label)
            raise ours or SourceError(f"cannot read {self._label}: {str(error).splitlines()[0]}") from None


def checkpoint_of(
    row: Row, blobs: Mapping[tuple[str, str | None], ValueRef | str], formats: Formats
) -> Checkpoint:
    """A row as a record; ``blobs`` are those of its namespace by channel and version."""
    checkpoint, metadata = row[4:]
    if checkpoint is None or metadata is None:
        raise NotCanonicalError("the checkpoint or its metadata is NULL")
    inline, versions, body = split_usual_json(checkpoint) or _split(checkpoint)
    named = versions if inline.keys() <= versions.keys() else {**dict.fromkeys(inline), **versions}
    refs = []
    for key in sorted(named.items()):
        blob = blobs.get(key)
        if key[0] in inline:
            if (ref := _inline(key, inline[key[0]], blob, formats)) is not None:
                refs.append(ref)
        elif isinstance(blob, str):
            raise NotCanonicalError(blob)
        # A snapshot belongs to the checkpoints that carry its marker. Later ones may still be at its
        # version without holding it, and SQLite says so by leaving the channel out.
        elif blob is not None and not blob.delta:
            refs.append(blob)
    return make(Checkpoint, (*row[:4], body, canonical_json(metadata), versions, tuple(refs)))


def _split(checkpoint: str) -> tuple[dict[str, Any], Mapping[str, str], bytes]:
    body = decode_json(checkpoint)
    if not isinstance(body, dict):
        raise NotCanonicalError("the checkpoint is not a JSON object")
    inline, named = body.pop("channel_values", None) or {}, body.get("channel_versions") or {}
    if not isinstance(inline, dict) or not isinstance(named, dict):
        raise NotCanonicalError("channel_values or channel_versions is not a map")
    versions = {c: version_text(v) for c, v in named.items()}
    return inline, versions, canonical_value(body)


def _inline(
    key: tuple[str, str | None], held: Any, blob: ValueRef | str | None, formats: Formats
) -> ValueRef | None:
    """What a checkpoint has in a channel that its row names, if anything."""
    if is_marker(held):
        marked = unmark(held)
        if marked is None:
            return None
        type_, data = formats.value(f"value of channel {key[0]!r}", *marked)
        delta = type_ == "msgpack" and is_delta(data)
        return make(ValueRef, (*key, type_, content_hash(data), data, len(data), delta))
    if isinstance(blob, str):
        raise NotCanonicalError(blob)
    if blob is not None:
        return blob
    if not formats.plain_types:
        formats.plaintext(f"value of channel {key[0]!r}")
    is_small = type(held) in _REMEMBERED and (type(held) is not str or len(held) <= _SHORT)
    return make(ValueRef, (*key, *(_of_scalar(held) if is_small else _of_json(held))))


_REMEMBERED = {str, int, bool, type(None)}
"""Not floats, of which two that are equal may have other bytes."""
_SHORT = 64


def _of_json(held: Any) -> tuple[str, bytes, bytes, int, bool]:
    """A value that the checkpoint's row holds itself, but for its channel and version."""
    type_, data = json_value(held)
    return type_, content_hash(data), data, len(data), False


_of_scalar = lru_cache(4096, typed=True)(_of_json)
