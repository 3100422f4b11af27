"""SQLite as a source that goes on changing: what has changed, the lock of a cut-over, the seal.

What a stamp is made of: both tables have rowids. A row that is inserted or replaced gets a higher one than
all others have, so a thread with the same keys at the same rowids is the same; but for rows that were
changed in place, and for rowids that were free again because the highest rows had been deleted. Therefore
lengths, the parent and the first bytes are part of a stamp: a checkpoint begins with its own time. What is
left, a value changed in place to another one of the same length, no saver does to a checkpoint. Ours do it
to special writes, which a stamp holds in full. The watch of :mod:`persistence.backends.sqlite.seal` shows
the rest during a cut-over.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from persistence.backends.sqlite import seal
from persistence.backends.sqlite.connection import error_code, file_uri
from persistence.backends.sqlite.transfer import SqliteSource
from persistence.backends.sqlite.transfer_file import require_file
from persistence.backends.sqlite.transfer_live_store import SqliteLiveStore
from persistence.errors import ConnectError, SourceError
from persistence.transfer.live import Locked, Stamp
from persistence.transfer.records import Record

if TYPE_CHECKING:
    from types import TracebackType

    from persistence.backends.sqlite.provider import SqliteProvider
    from persistence.transfer.options import Part

_TRY = 5
"""Milliseconds for one try to get the write lock: SQLite's own naps grow to a tenth of a second."""
_CHECKPOINT = """
rowid || ' ' || checkpoint_ns || ' ' || checkpoint_id || ' ' || coalesce(parent_checkpoint_id, '') || ' ' ||
coalesce(type, '') || ' ' || coalesce(length(checkpoint), '') || ' ' ||
coalesce(length(metadata), '') || ' ' || hex(substr(checkpoint, 1, 64))"""
_WRITE = """
rowid || ' ' || checkpoint_ns || ' ' || checkpoint_id || ' ' || task_id || ' ' || idx || ' ' ||
coalesce(channel, '') || ' ' || coalesce(type, '') || ' ' || coalesce(length(value), '') || ' ' ||
CASE WHEN idx < 0 THEN hex(value) ELSE hex(substr(value, 1, 32)) END"""
_PARTS = (("checkpoints", _CHECKPOINT), ("writes", _WRITE))
# All of this stands in the index of the primary key, so no row is read.
_KEYS = (
    ("checkpoints", "rowid || ' ' || checkpoint_ns || ' ' || checkpoint_id"),
    ("writes", "rowid || ' ' || checkpoint_ns || ' ' || checkpoint_id || ' ' || task_id || ' ' || idx"),
)
_STAMPS = """
SELECT thread_id, count(*), max(rowid), CAST(group_concat({1}, '|') AS BLOB) {2} FROM {0} {3}
GROUP BY thread_id ORDER BY thread_id
"""
_STAMP_UP_TO = "SELECT CAST(group_concat({1}, '|') AS BLOB) FROM {0} WHERE thread_id = ? AND +rowid <= ?"


class LiveSnapshot(SqliteSource):
    """One state of a file that goes on changing; see :class:`persistence.transfer.live.Snapshot`."""

    def stamps(self) -> Iterator[Stamp]:
        """Every thread, in order: by an index scan and a look at the beginning of each row."""
        return self._stamps("", (), with_rows=True)

    def keys(self) -> Iterator[Stamp]:
        """Every thread, in order: by an index scan."""
        return self._stamps("", (), with_rows=False)

    def stamp(self, thread: str) -> Stamp:
        """See :class:`persistence.transfer.live.Snapshot`."""
        (found,) = self._stamps("WHERE thread_id = ?", (thread,), with_rows=True)
        return found

    def _stamps(self, where: str, args: tuple[str, ...], *, with_rows: bool) -> Iterator[Stamp]:
        with self._reading():
            parts = []
            for (table, key), (_, row) in zip(_KEYS, _PARTS, strict=True):
                rows = f", CAST(group_concat({row}, '|') AS BLOB)" if with_rows else ""
                parts.append(_Ahead(self._conn.execute(_STAMPS.format(table, key, rows, where), args)))
            while heads := [part.row[0] for part in parts if part.row]:
                thread = min(heads)
                (checkpoints, *one), (writes, *other) = [part.take(thread) for part in parts]
                text = f"{one[0]} {one[1]} {other[0]} {other[1]}"
                if with_rows:
                    text += f"/{one[2]} {other[2]}"
                yield Stamp(thread, text, checkpoints, writes)

    def kept(self, before: Stamp) -> tuple[bool, bool]:
        """Whether the rows up to the stamp's marks are those that it was made of."""
        known = before.text.partition("/")[2].split(" ")
        with self._reading():
            now = [
                _digest(
                    self._conn.execute(_STAMP_UP_TO.format(*part), (before.thread_id, mark)).fetchone()[0]
                )
                for part, mark in zip(_PARTS, _marks(before), strict=True)
            ]
        return now[0] == known[0], now[1] == known[1]

    def since(self, before: Stamp, *, all_writes: bool) -> Iterator[Record]:
        """The rows above the stamp's marks."""
        checkpoint, write = _marks(before)
        with self._reading():
            after = (checkpoint, -1 if all_writes else write)
            yield from chain.from_iterable(self._merge(before.thread_id, data=True, after=after))

    def noted(self, after: int) -> tuple[set[str], int]:
        """See :class:`persistence.transfer.live.Snapshot`."""
        with self._reading():
            return seal.noted(self._conn, after)

    def live_store(self) -> SqliteLiveStore:
        """See :class:`persistence.transfer.live.Snapshot`."""
        return SqliteLiveStore(self._conn, self.label, self._reading)

    def shape(self) -> int:
        """The schema cookie: ``VACUUM``, which may give rows other rowids, changes it too."""
        with self._reading():
            return int(self._conn.execute("PRAGMA schema_version").fetchone()[0])


class LockedSnapshot(LiveSnapshot):
    """The state under a write lock, read by the connection that holds it.

    With a rollback journal nothing else in this process may even open the file: closing it would give up
    the lock.
    """

    def __init__(self, provider: SqliteProvider, conn: sqlite3.Connection) -> None:
        super().__init__(provider)
        self._conn = conn
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        self._unlocked = None
        self._stack = ExitStack()
        with self._reading():
            self._has_task_path = self._check_tables()
        return self

    def seal(self, target: str) -> None:
        """See :class:`persistence.transfer.live.Locked`."""
        seal.seal(self._conn, target)

    def unwatch(self) -> None:
        """See :class:`persistence.transfer.live.Locked`."""
        seal.unwatch(self._conn)


class LiveFile:
    """A file that an application goes on writing to; see :class:`persistence.transfer.live.LiveSource`.

    A context manager. It keeps a connection, so that the file has a write-ahead log for as long.
    """

    def __init__(self, provider: SqliteProvider) -> None:
        self.label = str(provider.dsn)
        self._provider = provider
        self._wait = provider.settings.sqlite_busy_timeout

    def __enter__(self) -> LiveFile:
        if self._provider.dsn.path is None:
            raise SourceError(f"{self.label} is in memory, so there is nothing to read")
        self._path = Path(self._provider.dsn.path)
        require_file(self._path, self.label)
        self.name = f"sqlite:{self._path.resolve()}"
        self._keep = self._connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep.close()
        self._provider.database.tidy()

    def version(self) -> int:
        """See :class:`persistence.transfer.live.LiveSource`."""
        return int(self._keep.execute("PRAGMA data_version").fetchone()[0])

    def snapshot(self) -> LiveSnapshot:
        """See :class:`persistence.transfer.live.LiveSource`."""
        return LiveSnapshot(self._provider)

    def require(self, parts: Collection[Part], *, sealing: bool) -> None:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._writing():
            pass

    def watch(self) -> None:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._writing() as conn:
            seal.watch(conn)

    def watch_store(self) -> None:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._writing() as conn:
            seal.watch_store(conn)

    def unwatch(self) -> None:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._writing() as conn:
            seal.unwatch(conn)

    @contextmanager
    def locked(self) -> Iterator[Locked]:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._writing() as conn, LockedSnapshot(self._provider, conn) as snapshot:
            yield snapshot

    def sealed(self) -> bool:
        """See :class:`persistence.transfer.live.LiveSource`."""
        return seal.is_sealed(self._keep)

    def unseal(self) -> bool:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._writing() as conn:
            seal.unwatch(conn)
            return seal.unseal(conn)

    def _connect(self) -> sqlite3.Connection:
        conn = sqlite3.connect(
            file_uri(self._path, "rw"),
            uri=True,
            timeout=self._wait,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            conn.close()
            raise SourceError(f"cannot read {self.label}: {error}") from None
        return conn

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction with the write lock, committed at the end of the block."""
        with closing(self._connect()) as conn:
            try:
                self._begin(conn)
                try:
                    yield conn
                    conn.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        conn.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise ConnectError(f"{self.label} cannot be written to: {error}", transient=False) from None

    def _begin(self, conn: sqlite3.Connection) -> None:
        conn.execute(f"PRAGMA busy_timeout = {_TRY}")
        deadline = time.monotonic() + self._wait
        while True:
            try:
                conn.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error_code(error) != sqlite3.SQLITE_BUSY:
                    raise
                if time.monotonic() > deadline:
                    raise ConnectError(
                        f"another process is writing to {self.label} and does not finish",
                        hint="look for a transaction that was left open; sqlite_busy_timeout waits longer",
                    ) from None
            else:
                # At the commit readers are waited for, where there is no write-ahead log.
                conn.execute(f"PRAGMA busy_timeout = {round(self._wait * 1000)}")
                return


class _Ahead:
    """One table's threads with the next one in sight."""

    def __init__(self, rows: Iterator[tuple[Any, ...]]) -> None:
        self._rows = rows
        self.row = self._next()

    def _next(self) -> tuple[Any, ...] | None:
        row = next(self._rows, None)
        if row is not None and not isinstance(row[0], str):
            raise SourceError(f"a thread id is stored as {type(row[0]).__name__}, not as text: {row[0]!r}")
        return row

    def take(self, thread: str) -> tuple[int, int, str, str]:
        """How many rows the thread has, the highest rowid, and digests of their keys and of the rows."""
        if self.row is None or self.row[0] != thread:
            return 0, -1, _digest(None), _digest(None)
        _, count, mark, *marks = self.row
        self.row = self._next()
        return count, mark, _digest(marks[0]), _digest(marks[-1])


def _digest(marks: bytes | None) -> str:
    return hashlib.sha256(marks or b"").hexdigest()[:32]


def _marks(stamp: Stamp) -> tuple[int, int]:
    checkpoint, _, write, _ = stamp.keys.split(" ")
    return int(checkpoint), int(write)
