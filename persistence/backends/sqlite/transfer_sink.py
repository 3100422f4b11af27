"""SQLite as the target of a transfer: each batch in one transaction, with its ledger entry.

Row formats: ``langgraph-checkpoint-sqlite`` 3.1.2. A checkpoint's row is put together from the bytes of its
values; nothing is deserialised.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, Any

import ormsgpack

from persistence.backends.sqlite.codec import inside_map, joined
from persistence.backends.sqlite.connection import translate
from persistence.backends.sqlite.transfer import SqliteSource, require_plain_order
from persistence.backends.sqlite.transfer_file import place_of
from persistence.backends.sqlite.transfer_lock import sole_transfer
from persistence.backends.sqlite.transfer_preflight import SqlitePreflight
from persistence.backends.sqlite.transfer_store import SqliteStoreSink
from persistence.errors import ConflictError, ConnectError, TransferError
from persistence.transfer.canonical import decode_json
from persistence.transfer.digest import describe
from persistence.transfer.formats import Formats
from persistence.transfer.held import HeldValues
from persistence.transfer.keys import Key
from persistence.transfer.ledger import Ledger, LedgerEntry, Statement, entry_statements
from persistence.transfer.records import Batch, Checkpoint, Record, Value, Write

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from persistence.backends.sqlite.provider import SqliteProvider
    from persistence.backends.sqlite.transfer_follower import SqliteFollower
    from persistence.backends.sqlite.transfer_store_follower import SqliteStoreFollower

_PUT = """
INSERT INTO checkpoints
    (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_PUT_WRITE = """
INSERT INTO writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, value)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_REMOVE = "DELETE FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
_REMOVE_WRITE = """
DELETE FROM writes
WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ? AND task_id = ? AND idx = ?
"""
_HAS_THREAD = """
SELECT EXISTS (SELECT 1 FROM checkpoints WHERE thread_id = ?1)
    OR EXISTS (SELECT 1 FROM writes WHERE thread_id = ?1)
"""
_IS_THERE = (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE)


class SqliteSink:
    """A SQLite file that a transfer writes to; it may not exist yet. A context manager.

    Each transaction has a connection of its own. One that stayed open could lose its locks: closing a file
    gives up all locks that the process has on it, and a source that reads the same file opens and closes it.
    """

    fresh = "a file that does not exist yet"
    repeats_values = True
    now = "strftime('%Y-%m-%d %H:%M:%f', 'now')"

    def __init__(self, provider: SqliteProvider) -> None:
        self.label = str(provider.dsn)
        self._provider = provider
        self._database = provider.database
        self.formats = Formats(provider.settings, allow_pickle=True)  # as they are; it unpickles nothing
        self._rehearsing: sqlite3.Connection | None = None

    def __enter__(self) -> SqliteSink:
        if self._database.path is None:
            raise TransferError(
                f"{self.label} is in memory, so what is moved there would be lost at once",
                hint="name a file: sqlite:///chat.db",
            )
        self._path: Path = self._database.path
        self._database.check_path(self._path)
        # A log that was there is not ours to empty, unless something is written.
        self._tidy = not self._database.has_log()
        if self._path.exists():
            with self.errors(), closing(self._database.connect(readonly=True)) as conn:
                require_plain_order(conn, self.label)
        self._values = HeldValues()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.close()
        if self._tidy:
            self._database.tidy()

    @property
    def identity(self) -> str:
        """The file itself, whatever its name: a copy is another target."""
        return f"sqlite:{self._path.stat().st_ino if self._path.exists() else 'new'}"

    @property
    def place(self) -> str:
        """See :class:`persistence.transfer.records.Sink`."""
        return place_of(self._path) if self._path.exists() else self.identity

    def preflight(self) -> SqlitePreflight:
        """See :class:`persistence.transfer.records.Sink`."""
        return SqlitePreflight()

    def ledger(self) -> Ledger:
        """See :class:`persistence.transfer.records.Sink`."""
        return Ledger(self)

    def exclusive(self) -> AbstractContextManager[None]:
        """See :class:`persistence.transfer.records.Sink`."""
        return sole_transfer(self._path, self.label)

    def existing(self, threads: Sequence[str]) -> set[str]:
        """See :class:`persistence.transfer.records.Sink`. A file that is not there is not made."""
        if not self._path.exists():
            return set()
        with self.errors(), self.reader() as conn:
            return {thread for thread in threads if conn.execute(_HAS_THREAD, (thread,)).fetchone()[0]}

    def row(self, record: Value | Checkpoint | Write) -> Value | Checkpoint | Write:
        """See :class:`persistence.transfer.records.Sink`; a row needs the values of those before it."""
        return record

    def write(self, batch: Batch) -> None:
        """See :class:`persistence.transfer.records.Sink`."""
        with self.transaction() as conn:
            for thread in batch.replaces:
                conn.execute("DELETE FROM checkpoints WHERE thread_id = ?", (thread,))
                conn.execute("DELETE FROM writes WHERE thread_id = ?", (thread,))
            for _, record in batch.rows:
                self.insert(conn, record)
            self.enter(conn, batch.entry, batch.keys)

    def enter(self, conn: sqlite3.Connection, entry: LedgerEntry, keys: bytes) -> None:
        """Note a batch in the ledger, in the transaction that writes it."""
        for statement, args in entry_statements(entry, keys, self.now):
            conn.execute(statement, args)

    def store(self) -> SqliteStoreSink:
        """See :class:`persistence.transfer.records.Sink`."""
        return SqliteStoreSink(self)

    def placed(self, records: Iterable[Record]) -> Generator[Record]:
        """See :class:`persistence.transfer.records.Sink`; a row holds all its values."""
        yield from records

    def skip(self, batch: Batch) -> None:
        """See :class:`persistence.transfer.records.Sink`."""
        for _, record in batch.rows:
            if isinstance(record, Value):
                self._values.add(record)

    def source(self) -> SqliteSource:
        """See :class:`persistence.transfer.records.Sink`."""
        return SqliteSource(self._provider, formats=self.formats)

    def values(self, thread: str) -> Iterator[Value]:
        """See :class:`persistence.transfer.records.Sink`."""
        return iter(())

    @contextmanager
    def removing(self) -> Iterator[SqliteRemoval]:
        """See :class:`persistence.transfer.records.Sink`."""
        with self.transaction() as conn:
            yield SqliteRemoval(conn, self.label, self.formats)

    def query(self, statement: str, args: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """See :class:`persistence.transfer.ledger.Tables`. A file that is not there is not made."""
        if not self._path.exists():
            return []
        with self.errors(), self.reader() as conn:
            return conn.execute(statement, args).fetchall()

    def change(self, statements: Iterable[Statement]) -> None:
        """See :class:`persistence.transfer.ledger.Tables`."""
        with self.transaction() as conn:
            for statement, args in statements:
                conn.execute(statement, args)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """A connection that only reads. A file that is not there is not made."""
        if not self._path.exists():
            yield None
            return
        with self.errors(), self.reader() as conn:
            yield conn

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A block that is committed at its end, or not at all."""
        if self._rehearsing is not None:
            yield self._rehearsing
            return
        self._tidy = True
        with self.errors(), closing(self._database.connect()) as conn:
            conn.execute("BEGIN IMMEDIATE")
            yield conn
            conn.execute("COMMIT")

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """See :class:`persistence.transfer.records.Sink`."""
        with self.errors(), closing(self._database.rehearse()) as conn:
            conn.execute("BEGIN IMMEDIATE")
            self._rehearsing = conn
            try:
                yield
            finally:
                self._rehearsing = None
                if conn.in_transaction:  # a full disk has rolled back already
                    conn.execute("ROLLBACK")

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading."""
        if self._rehearsing is not None:
            yield self._rehearsing
            return
        with closing(self._database.connect(readonly=True)) as conn:
            yield conn

    def follower(self, run_id: str) -> SqliteFollower:
        """See :class:`persistence.transfer.records.Sink`."""
        from persistence.backends.sqlite.transfer_follower import SqliteFollower

        return SqliteFollower(self, run_id)

    def store_follower(self, run_id: str) -> SqliteStoreFollower:
        """See :class:`persistence.transfer.records.Sink`."""
        from persistence.backends.sqlite.transfer_store_follower import SqliteStoreFollower

        return SqliteStoreFollower(self, run_id)

    def insert(self, conn: sqlite3.Connection, record: Value | Checkpoint | Write) -> None:
        """Store a record, in the transaction that is open."""
        try:
            match record:
                case Value():
                    self._values.add(record)
                case Checkpoint():
                    key = (record.thread_id, record.checkpoint_ns, record.checkpoint_id, record.parent_id)
                    row = self.formats.sealed("msgpack", self._packed(record))
                    conn.execute(_PUT, (*key, *row, record.metadata))
                case Write():
                    row = self.formats.sealed(record.type, record.data or b"")
                    conn.execute(_PUT_WRITE, (*record[:7], *row))
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode not in _IS_THERE:  # a rule that somebody added
                raise
            raise ConflictError(
                f"{self.label} holds a row that the transfer brings: {describe(record)}",
                hint="something else wrote to the target meanwhile; what was committed before stays and is"
                " continued by running the command again",
            ) from None

    def _packed(self, record: Checkpoint) -> bytes:
        """The checkpoint with its values as one msgpack map."""
        values = {}
        for ref in record.values:
            if (data := self._values.get(record, ref)) is None:
                raise TransferError(f"{describe(record)}: the value of channel {ref.channel!r} is missing")
            values[ref.channel] = inside_map(ref.type, data)
        return joined(ormsgpack.packb(decode_json(record.body)), values)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """A block in which SQLite's errors become ours."""
        try:
            yield
        except sqlite3.Error as error:
            if (ours := translate(error, self.label)) is not None:
                raise ours from None
            if "locked" in str(error):
                raise ConnectError(f"another process is writing to {self.label}: {error}") from None
            raise TransferError(f"{self.label} refused the data: {error}") from None


class SqliteRemoval:
    """Takes rows out again, in the transaction of :meth:`SqliteSink.removing`."""

    def __init__(self, conn: sqlite3.Connection, label: str, formats: Formats) -> None:
        self._conn = conn
        self.source = SqliteSource.on(conn, label, formats)

    def remove(self, thread: str, keys: Iterable[Key]) -> None:
        """See :class:`persistence.transfer.records.Removal`; values have no rows here."""
        for key in keys:
            if key.kind == "c":
                self._conn.execute(_REMOVE, (thread, key.checkpoint_ns, key.name))
            elif key.kind == "w":
                self._conn.execute(_REMOVE_WRITE, (thread, *key[1:]))
