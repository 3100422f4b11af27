"""Postgres as the target of a transfer: batches by binary COPY, each with its ledger entry.

Row formats: ``langgraph-checkpoint-postgres`` 3.2.0. Rows are built as bytes in COPY's binary form,
without a driver's conversions; what they hold was checked by the preflight.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import ClientCursor, IsolationLevel, errors
from psycopg.rows import tuple_row

from persistence.backends.postgres.connection import (
    connect,
    database_identity,
    lift_time_limits,
    stay_connected,
    translate,
)
from persistence.backends.postgres.copying import HEADER, TRAILER
from persistence.backends.postgres.transfer_ahead import prepare
from persistence.backends.postgres.transfer_preflight import PostgresPreflight
from persistence.backends.postgres.transfer_rows import Rows
from persistence.backends.postgres.transfer_source import PostgresSource
from persistence.backends.postgres.transfer_store import PostgresStoreSink
from persistence.backends.postgres.transfer_versions import Placement, Versions
from persistence.errors import ConflictError, SchemaError, TransferError
from persistence.transfer.canonical import NotCanonicalError
from persistence.transfer.formats import Formats
from persistence.transfer.keys import Key, kind_of
from persistence.transfer.ledger import Ledger, LedgerEntry, Statement, entry_statements
from persistence.transfer.records import Batch, Checkpoint, Record, Value, Write

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg import Connection, Cursor

    from persistence.backends.postgres.transfer_follower import PostgresFollower
    from persistence.backends.postgres.transfer_store_follower import PostgresStoreFollower
    from persistence.contract import Provider
    from persistence.transfer.workers import OpenSink

_LOCK_WAIT = 10.0
"""Seconds to wait for another transfer: a killed one's connection may outlive it for a moment."""
_LOCK_POLL = 0.2
_OTHER_TYPE = (errors.ProtocolViolation, errors.InvalidBinaryRepresentation)
"""What the server says of a binary field that is shorter or longer than the column's type."""

_TABLES = {
    "checkpoint_blobs": "thread_id, checkpoint_ns, channel, version, type, blob",
    "checkpoint_writes": (
        "thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob"
    ),
    "checkpoints": "thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata",
}
_KINDS = ("v", "w", "c")
"""The kind of the records that each of them holds."""
_ROWS_AT_ONCE = 250
"""Rows that are sent at once: libpq keeps as much room as the largest needed."""
_REMOVE = {
    "c": ("checkpoints", ("checkpoint_ns", "checkpoint_id")),
    "v": ("checkpoint_blobs", ("checkpoint_ns", "channel", "version")),
    "w": ("checkpoint_writes", ("checkpoint_ns", "checkpoint_id", "task_id", "idx")),
}


class PostgresSink:
    """A Postgres database that a transfer writes to. A context manager."""

    fresh = "an empty database or schema"
    repeats_values = False
    now = "now()"

    def __init__(self, provider: Provider, versions: Versions | None = None) -> None:
        self.label = str(provider.dsn)
        self._provider = provider
        self.formats = Formats(provider.settings, allow_pickle=True)
        self._versions = versions or Versions(all_blobs=self.formats.encrypts)
        self._rows = Rows(self._versions, self.formats)

    def __enter__(self) -> PostgresSink:
        with ExitStack() as stack:
            stack.enter_context(self.errors())
            self._conn = stack.enter_context(self._connect())
            self._conn.isolation_level = IsolationLevel.READ_COMMITTED  # see clear()
            stay_connected(self._conn)
            encoding = self._conn.info.parameter_status("server_encoding")
            if encoding != "UTF8":
                raise TransferError(f"{self.label} has the encoding {encoding}, not UTF8")
            schema = self._provider.settings.db_schema
            if schema is None:
                row = self._conn.cursor(row_factory=tuple_row).execute("SELECT current_schema()").fetchone()
                schema = row[0] if row else None
            self.identity = self.place = f"{database_identity(self._conn)}/{schema}"
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def share(self) -> OpenSink:
        """See :mod:`persistence.transfer.workers`."""
        return partial(PostgresSink, self._provider, self._versions)

    def preflight(self) -> PostgresPreflight:
        """See :class:`persistence.transfer.records.Sink`."""
        self._versions = Versions(all_blobs=self.formats.encrypts)
        self._rows = Rows(self._versions, self.formats)
        return PostgresPreflight(self._versions, None if self.formats.encrypts else self._rows)

    def placed(self, records: Iterable[Record]) -> Generator[Record]:
        """See :class:`persistence.transfer.records.Sink`."""
        return Placement(self._versions, all_blobs=self.formats.encrypts).records(records)

    def ledger(self) -> Ledger:
        """See :class:`persistence.transfer.records.Sink`."""
        return Ledger(self)

    def source(self) -> PostgresSource:
        """See :class:`persistence.transfer.records.Sink`."""
        return PostgresSource(self._provider, allow_pickle=True)  # which it shows, and does not unpickle

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold a transaction-level lock on a connection of its own, as PgBouncer has no session ones.

        The parameters are bound by the client: by the extended protocol the statement's portal would
        keep its snapshot, and a ``CREATE INDEX CONCURRENTLY`` elsewhere would wait for it.
        """
        deadline = time.monotonic() + _LOCK_WAIT
        with self.errors(), self._connect() as conn, conn.transaction():
            cursor = ClientCursor(conn, row_factory=tuple_row)
            lift_time_limits(cursor)
            while not self._try_lock(cursor):
                if time.monotonic() > deadline:
                    raise ConflictError(
                        f"another transfer into {self.label} is under way",
                        hint="wait until it has ended, then run the command again",
                    )
                time.sleep(_LOCK_POLL)
            yield

    def _try_lock(self, cursor: Cursor[tuple[Any, ...]]) -> bool:
        key = hashlib.sha256(f"persistence-transfer {self._provider.settings.db_schema or ''}".encode())
        number = int.from_bytes(key.digest()[:8], signed=True)
        return bool(cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [number]).fetchall()[0][0])

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """See :class:`persistence.transfer.records.Sink`."""
        with self.errors(), self._conn.transaction(force_rollback=True):
            lift_time_limits(self._conn.cursor())
            yield
            # Those that wait for a commit, too.
            self._conn.execute("SET CONSTRAINTS ALL IMMEDIATE")

    @contextmanager
    def ahead(self, told: Callable[[], None]) -> Iterator[PostgresSink | None]:
        """See :class:`persistence.transfer.ahead.AheadSink`.

        Its transaction has the lock of :meth:`exclusive`: a pool may have no third connection.
        """
        with PostgresSink(self._provider, self._versions) as other, other.transaction() as cursor:
            lift_time_limits(cursor)
            is_free = self._try_lock(cursor) and prepare(self._provider, cursor, told)
            yield other if is_free else None

    def cancel(self) -> None:
        """See :class:`persistence.transfer.ahead.Writing`."""
        with suppress(psycopg.Error):  # then there is no server to wait for
            self._conn.cancel_safe(timeout=_LOCK_WAIT)

    def existing(self, threads: Sequence[str]) -> set[str]:
        """See :class:`persistence.transfer.records.Sink`."""
        statement = " UNION ".join(
            f"SELECT thread_id FROM {table} WHERE thread_id = ANY(%(threads)s)" for table in _TABLES
        )
        with self.errors():
            cursor = self._conn.cursor(row_factory=tuple_row)
            # A thread whose id Postgres cannot hold is not there.
            held = [thread for thread in threads if "\0" not in thread]
            return {row[0] for row in cursor.execute(statement.encode(), {"threads": held})}

    def write(self, batch: Batch) -> None:
        """See :class:`persistence.transfer.records.Sink`."""
        with self.transaction() as cursor:
            if batch.replaces:
                self.clear(cursor, list(batch.replaces))
            self._copy(cursor, batch.rows)
            self.enter(cursor, batch.entry, batch.keys)

    def clear(self, cursor: Cursor[Any], threads: list[str]) -> None:
        """Delete all of some threads, in the transaction that is open.

        Raises:
            ConflictError: A checkpoint was put meanwhile, and would lack what it builds on.
        """
        for table in _TABLES:
            cursor.execute(f"DELETE FROM {table} WHERE thread_id = ANY(%s)".encode(), [threads])
        cursor.execute("SELECT thread_id FROM checkpoints WHERE thread_id = ANY(%s) LIMIT 1", [threads])
        if found := cursor.fetchall():
            raise ConflictError(
                f"somebody has written to thread {found[0][0]!r} in {self.label} while it was replaced",
                hint="what was committed before stays; when nothing else writes to it, run the command again",
            )

    def row(self, record: Value | Checkpoint | Write) -> bytes:
        """See :class:`persistence.transfer.records.Sink`."""
        return self._rows.row(record)

    def insert(self, cursor: Cursor[Any], records: Iterable[Value | Checkpoint | Write]) -> None:
        """Copy records into the tables, in the transaction that is open."""
        self._copy(cursor, [(kind_of(record), self.row(record)) for record in records])

    def _copy(self, cursor: Cursor[Any], rows: Sequence[tuple[str, bytes]]) -> None:
        by_kind: dict[str, list[bytes]] = {kind: [] for kind in _KINDS}
        for kind, row in rows:
            by_kind[kind].append(row)
        for kind, (table, columns) in zip(_KINDS, _TABLES.items(), strict=True):
            if not (mine := by_kind[kind]):
                continue
            mine = [HEADER, *mine, TRAILER]
            statement = f"COPY {table} ({columns}) FROM STDIN (FORMAT BINARY)"
            try:
                with cursor.copy(statement.encode()) as copy:
                    for start in range(0, len(mine), _ROWS_AT_ONCE):
                        copy.write(b"".join(mine[start : start + _ROWS_AT_ONCE]))
            except _OTHER_TYPE as error:
                raise SchemaError(
                    f"a column in {self.label} has another type than LangGraph gives it: "
                    f"{error.diag.context or table}",
                    hint="compare it with the output of `persistence schema sql`, and alter it",
                ) from None

    @contextmanager
    def transaction(self) -> Iterator[Cursor[tuple[Any, ...]]]:
        """A block that is committed at its end, or not at all."""
        with self.errors(), self._conn.transaction():
            yield self._conn.cursor(row_factory=tuple_row)

    def follower(self, run_id: str) -> PostgresFollower:
        """See :class:`persistence.transfer.records.Sink`."""
        from persistence.backends.postgres.transfer_follower import PostgresFollower

        return PostgresFollower(self, run_id)

    def store_follower(self, run_id: str) -> PostgresStoreFollower:
        """See :class:`persistence.transfer.records.Sink`."""
        from persistence.backends.postgres.transfer_store_follower import PostgresStoreFollower

        return PostgresStoreFollower(self, run_id)

    def enter(self, cursor: Cursor[Any], entry: LedgerEntry, keys: bytes) -> None:
        """Note a batch in the ledger, in the transaction that writes it."""
        for statement, args in entry_statements(entry, keys, self.now):
            cursor.execute(_own(statement), args)

    def store(self) -> PostgresStoreSink:
        """See :class:`persistence.transfer.records.Sink`."""
        return PostgresStoreSink(self, self._conn, self._provider.settings.db_schema)

    def skip(self, batch: Batch) -> None:
        """See :class:`persistence.transfer.records.Sink`; each value has a row of its own."""

    def values(self, thread: str) -> Iterator[Value]:
        """See :class:`persistence.transfer.records.Sink`."""
        statement = (
            "SELECT thread_id, checkpoint_ns, channel, version, type, sha256(coalesce(blob, '')),"
            " CASE WHEN type = ANY(?) THEN NULL ELSE blob END"
            " FROM checkpoint_blobs WHERE type <> 'empty' AND thread_id = ?"
        )
        for row in self.query(statement, (list(self.formats.plain_types), thread)):
            *key, type_, digest, blob = row
            if blob is not None:
                with suppress(NotCanonicalError):  # then it is no value that a transfer has brought
                    type_, blob = self.formats.value("value", type_, blob)
                    digest = hashlib.sha256(blob).digest()
            yield Value._make((*key, type_, digest, b""))

    @contextmanager
    def removing(self) -> Iterator[PostgresRemoval]:
        """See :class:`persistence.transfer.records.Sink`."""
        with self.errors(), self._conn.transaction():
            cursor = self._conn.cursor()
            cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT:.0f}s'".encode())
            cursor.execute(f"LOCK TABLE {', '.join(_TABLES)} IN SHARE ROW EXCLUSIVE MODE".encode())
            yield PostgresRemoval(self._conn, self.label, self.formats)

    def query(self, statement: str, args: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """See :class:`persistence.transfer.ledger.Tables`."""
        with self.errors():
            return self._conn.cursor(row_factory=tuple_row).execute(_own(statement), args).fetchall()

    def change(self, statements: Iterable[Statement]) -> None:
        """See :class:`persistence.transfer.ledger.Tables`."""
        with self.errors(), self._conn.transaction():
            for statement, args in statements:
                self._conn.execute(_own(statement), args)

    def _connect(self) -> Connection[Any]:
        return connect(self._provider.dsn, self._provider.settings)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """A block in which the driver's errors become ours."""
        try:
            yield
        except errors.UniqueViolation as error:
            detail = (error.diag.message_detail or str(error)).splitlines()[0]
            raise ConflictError(
                f"{self.label} holds a row that the transfer brings: {detail}",
                hint="something else wrote to the target meanwhile; what was committed before stays and is"
                " continued by running the command again",
            ) from None
        except psycopg.Error as error:
            if (ours := translate(error, self.label)) is not None:
                raise ours from None
            raise TransferError(f"{self.label} refused the data: {str(error).splitlines()[0]}") from None


class PostgresRemoval:
    """Takes rows out again, in the transaction of :meth:`PostgresSink.removing`."""

    def __init__(self, conn: Connection[Any], label: str, formats: Formats) -> None:
        self._conn = conn
        self.source = PostgresSource.on(conn, label, formats)

    def remove(self, thread: str, keys: Iterable[Key]) -> None:
        """See :class:`persistence.transfer.records.Removal`."""
        for kind, group in groupby(sorted(keys), key=attrgetter("kind")):
            table, columns = _REMOVE[kind]
            arrays = [list(column) for column in zip(*(key[1:] for key in group), strict=True)][
                : len(columns)
            ]
            types = ["int[]" if column == "idx" else "text[]" for column in columns]
            statement = (
                f"DELETE FROM {table} WHERE thread_id = %s AND ({', '.join(columns)})"
                f" IN (SELECT * FROM unnest({', '.join(f'%s::{kind}' for kind in types)}))"
            )
            self._conn.execute(statement.encode(), [thread, *arrays])


def _own(statement: str) -> bytes:
    """A statement of the ledger, as the driver wants it."""
    return statement.replace("?", "%s").encode()
