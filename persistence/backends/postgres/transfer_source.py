"""Postgres as the source of a transfer, and as the side that a verification asks for its hashes.

Row formats: ``langgraph-checkpoint-postgres`` 3.2.0. Scalars stand in the checkpoint's JSONB, every other
value in ``checkpoint_blobs`` under its channel's version; a blob wins over a scalar, and a marker of
our own savers (see ``persistence.backends.postgres.markers``) over a blob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

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

_FETCH = 500
_FETCH_BYTES = 4_000_000
_THREADS_AT_ONCE = 5_000


class Where(NamedTuple):
    """A condition beside those that a query has, and its parameters."""

    text: str = ""
    args: tuple[object, ...] = ()


_EVERYWHERE = Where()


class Query(NamedTuple):
    """A table in order: COLLATE "C" is that of UTF-8 bytes, whatever the database's own collation."""

    name: str
    columns: str
    """With a place for the column that is only wanted with the data."""
    data: str
    size: str
    """About how many bytes a row sends."""
    rest: str


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
    "4 * (pg_column_size(checkpoint) + pg_column_size(metadata))",  # it may be stored compressed
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
            self._conn: Connection[Any] = stack.enter_context(
                closing(connect(self._provider.dsn, self._provider.settings))
            )
            # One snapshot for all statements, and no limit of time while the other side is busy.
            self._conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            if self._snapshot is not None:
                name = sql.Literal(self._snapshot)
                self._conn.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(name))
            self._conn.execute(_DISTRIBUTED)
            lift_time_limits(self._conn.cursor())
            # Where a policy would hide rows, an error: what is not seen is neither moved nor compared.
            self._conn.execute("SET LOCAL row_security = off")
            self._stack = stack.pop_all()
        return self

    @classmethod
    def on(cls, conn: Connection[Any], label: str, formats: Formats) -> PostgresSource:
        """What a transaction of somebody else's sees."""
        source = cls.__new__(cls)
        source.label, source._conn, source._formats = label, conn, formats
        return source

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(psycopg.Error):  # nothing was written, and all was read that was asked for
            self._conn.rollback()
        self._stack.close()

    def share(self) -> Open:
        """See :mod:`persistence.transfer.workers`; it lasts as long as this snapshot."""
        with self.errors():
            (name,) = self.cursor().execute("SELECT pg_export_snapshot()").fetchall()[0]
        return partial(PostgresSource, self._provider, name, allow_pickle=self._allow_pickle)

    @property
    def database(self) -> str:
        """See :class:`persistence.transfer.records.Source`."""
        with self.errors():
            return database_identity(self._conn)

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

        return PostgresOfficial(self._conn, self._provider.settings, self.errors)

    def threads(self) -> Iterator[str]:
        """See :class:`persistence.transfer.records.Source`."""
        with self.errors():
            fetch = self.declare("threads", _THREADS)
            while rows := fetch(_THREADS_AT_ONCE):
                yield from (row[0] for row in rows)

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
        """See :class:`persistence.transfer.records.Source`."""
        with self.errors():
            if threads is None:
                yield from self._some(None, data=data)
                return
            for some in _held(threads):
                yield from self._some(some, data=data)

    def store(self) -> PostgresStoreSource:
        """See :class:`persistence.transfer.records.Source`."""
        from persistence.backends.postgres.transfer_store import PostgresStoreSource

        return PostgresStoreSource(self, self._conn, self._provider.settings.db_schema)

    def _some(self, threads: Sequence[str] | None, *, data: bool) -> Iterator[Record]:
        if not data and self._has_others is None:
            others = self.cursor().execute(_OTHERS, {"plain": list(self._formats.plain_types)})
            self._has_others = bool(others.fetchall()[0][0])
        some = _EVERYWHERE if threads is None else Where("AND thread_id = ANY(%s)", (list(threads),))
        blobs = Ahead(self.rows(BLOBS, some, data=data))
        checkpoints = Ahead(self.rows(CHECKPOINTS, some, data=data))
        writes = Ahead(self.rows(self.writes(), some, data=data))
        while heads := [stream.row for stream in (blobs, checkpoints, writes) if stream.row]:
            thread = min(row[0] for row in heads)
            while heads := [s.row for s in (blobs, checkpoints) if s.row and s.row[0] == thread]:
                ns = min(row[1] for row in heads)
                yield from self.namespace(thread, ns, blobs, checkpoints, {}, data=data)
            for row in writes.take((thread,)):
                yield self.write(row, data=data)

    def namespace(
        self,
        thread: str,
        ns: str,
        blobs: Ahead,
        checkpoints: Ahead,
        held: dict[tuple[str, str], Blob | str],
        *,
        data: bool,
    ) -> Iterator[Record]:
        """The next rows as records, values first; ``held`` gets those, by channel and version."""
        # Values that no checkpoint can refer to are no content; a thread may have nothing else.
        data = data and checkpoints.row is not None and checkpoints.row[:2] == (thread, ns)
        for _, _, channel, version, type_, digest, start, size, blob in blobs.take((thread, ns)):
            if type_ not in self._formats.plain_types:
                try:
                    type_, blob = self._formats.value(f"value of channel {channel!r}", type_, blob or b"")
                except NotCanonicalError as error:
                    held[channel, version] = str(error)
                    continue
                digest, start, size = hashlib.sha256(blob).digest(), blob[:6], len(blob)
            delta = type_ == "msgpack" and is_delta(start or b"")
            held[channel, version] = Blob(type_, digest, size or 0, delta)
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

    def write(self, row: tuple[Any, ...], *, data: bool) -> Write | Reject:
        """A row of writes as a record."""
        thread, ns, checkpoint, *_, channel, type_, digest, blob = row
        if type_ not in self._formats.plain_types or digest is None:
            try:
                type_, blob = self._formats.value(f"write to channel {channel!r}", type_, blob)
            except NotCanonicalError as error:
                return Reject(thread, ns, checkpoint, str(error), msgspec.msgpack.encode(row))
            digest = hashlib.sha256(blob).digest()
        return make(Write, (*row[:7], type_, digest, blob if data else None))

    def rows(
        self, query: Query, where: Where = _EVERYWHERE, *, data: bool = True
    ) -> Iterator[tuple[Any, ...]]:
        """All rows in order, some at a time, so that memory stays bounded whatever their size."""
        if query.data and self._has_others:
            data = True
        columns = query.columns.format(data=query.data if data else "NULL")
        rest = query.rest.format(where=where.text)
        rows = self.declare(query.name, f"SELECT {columns} {rest}", where.args)
        if data or not query.data:
            sizes = self.declare(f"{query.name}_sizes", f"SELECT {query.size} {rest}", where.args)
            for count in _counts(sizes):
                yield from rows(count)
        else:
            while some := rows(_FETCH):
                yield from some

    def declare(self, name: str, statement: str, args: Sequence[object] = ()) -> _Fetch:
        """A server-side cursor; gives its next rows."""
        cursor = self.cursor()
        # One that an earlier call left, which may not have been read to its end.
        if cursor.execute("SELECT 1 FROM pg_cursors WHERE name = %s", [f"transfer_{name}"]).fetchone():
            cursor.execute(f"CLOSE transfer_{name}".encode())
        declare = f"DECLARE transfer_{name} NO SCROLL CURSOR FOR {statement}"
        cursor.execute(declare.encode(), args or None)
        return lambda count: cursor.execute(f"FETCH {count} FROM transfer_{name}".encode()).fetchall()

    def cursor(self) -> Cursor[tuple[Any, ...]]:
        """A cursor in the snapshot."""
        return self._conn.cursor(binary=True, row_factory=tuple_row)

    def errors(self) -> _ReadErrors:
        """A block in which the driver's errors become ours."""
        return _ReadErrors(self.label)


def _held(threads: Sequence[str]) -> Iterator[list[str]]:
    """Ids, some at a time. A thread whose id Postgres cannot hold is not there."""
    held = [thread for thread in threads if "\0" not in thread]
    for start in range(0, len(held), _THREADS_AT_ONCE):
        yield held[start : start + _THREADS_AT_ONCE]


_Fetch = Callable[[int], list[tuple[Any, ...]]]


def _counts(sizes: _Fetch) -> Iterator[int]:
    """How many rows to fetch, each time, so that they have a bounded number of bytes: or one row."""
    count = total = 0
    while rows := sizes(_FETCH):
        for (size,) in rows:
            if count and (count == _FETCH or total + (size or 0) > _FETCH_BYTES):
                yield count
                count = total = 0
            count += 1
            total += size or 0
    if count:
        yield count


class Blob(NamedTuple):
    """A value; where it cannot be shown, the reason stands in its place."""

    type: str
    sha256: bytes
    size: int
    delta: bool


class Ahead:
    """Sorted rows with the next one in sight."""

    def __init__(self, rows: Iterator[tuple[Any, ...]]) -> None:
        self._rows = rows
        self.row = next(rows, None)

    def take(self, key: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        """The rows that begin with this key, which must be next."""
        while self.row is not None and self.row[: len(key)] == key:
            yield self.row
            self.row = next(self._rows, None)


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
    row: tuple[Any, ...], blobs: Mapping[tuple[str, str], Blob | str], formats: Formats
) -> Checkpoint:
    """A row as a record; ``blobs`` are those of its namespace by channel and version."""
    checkpoint, metadata = row[4:]
    if checkpoint is None or metadata is None:
        raise NotCanonicalError("the checkpoint or its metadata is NULL")
    inline, versions, body = split_usual_json(checkpoint) or _split(checkpoint)
    refs = []
    for channel in sorted(inline.keys() | versions.keys()):
        version = versions.get(channel)
        if is_marker(held := inline.get(channel)):
            if (marked := unmark(held)) is not None:
                value = formats.value(f"value of channel {channel!r}", *marked)
                refs.append(_inside(channel, version, *value))
            continue
        blob = blobs.get((channel, version)) if version is not None else None
        if isinstance(blob, str):
            raise NotCanonicalError(blob)
        # A snapshot belongs to the checkpoints that carry its marker. Later ones may still be at its
        # version without holding it, and SQLite says so by leaving the channel out.
        if blob is not None and not (blob.delta and channel not in inline):
            ref = (channel, version, blob.type, blob.sha256, None, blob.size, blob.delta)
            refs.append(make(ValueRef, ref))
        elif channel in inline:
            formats.plaintext(f"value of channel {channel!r}")
            refs.append(_inside(channel, version, *json_value(held)))
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


def _inside(channel: str, version: str | None, type_: str, data: bytes) -> ValueRef:
    """A value that the checkpoint's row holds itself."""
    delta = type_ == "msgpack" and is_delta(data)
    return make(ValueRef, (channel, version, type_, content_hash(data), data, len(data), delta))
