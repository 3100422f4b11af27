"""Postgres as a source that goes on changing: what has changed, the lock of a cut-over, the seal.

What a stamp is made of: each row has the number of the transaction that wrote it, ``xmin``, so two states of
a thread with the same keys and numbers are the same, whatever was done in between. ``VACUUM`` leaves that
number as it is; what does not, only causes more to be read. Lengths are part of a stamp for a server that
was restored to an earlier time, and gives the same numbers once more.

Which rows came after a stamp is told by its *mark*, the highest number in it. A transaction with a lower one
may commit later. Therefore the rows up to the mark must be those that the stamp was made of; else all of
the thread is read.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import errors, sql
from psycopg.rows import tuple_row

from persistence.backends.postgres import seal
from persistence.backends.postgres.connection import connect, translate
from persistence.backends.postgres.transfer_cursors import Cursors, Where
from persistence.backends.postgres.transfer_live_store import PostgresLiveStore
from persistence.backends.postgres.transfer_source import (
    BLOBS,
    CHECKPOINTS,
    Groups,
    PostgresSource,
    checkpoint_of,
)
from persistence.errors import ConnectError, TransferError
from persistence.transfer.canonical import NotCanonicalError
from persistence.transfer.live import Locked, Stamp
from persistence.transfer.records import Record, ValueRef

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg import Connection

    from persistence.contract import Provider
    from persistence.transfer.options import Part

_LOCK_WAIT = 30.0
"""Seconds to try for the lock."""
_TRY_MILLISECONDS = 400
"""One try, behind which writers queue: less than the second after which
Postgres looks for a deadlock."""
_PAUSE = 0.5
_IDLE_SECONDS = 60
_NONE = "-"
"""In place of a digest where there are no rows."""
_CHECKPOINTS_AT_ONCE = 50

_ROWS = (
    (
        "checkpoints",
        "xmin, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type,"
        " pg_column_size(checkpoint), pg_column_size(metadata)",
    ),
    (
        "checkpoint_writes",
        "xmin, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, octet_length(blob)",
    ),
    ("checkpoint_blobs", "xmin, checkpoint_ns, channel, version, type, octet_length(blob)"),
)
# The sums of two hashes of each row: they need no order.
_PART = """
SELECT thread_id, {part} AS part, count(*) AS count, max(mark) AS mark,
    sum(hash_record_extended(line, 0)) || '.' || sum(hash_record_extended(line, 1)) AS digest
FROM (SELECT thread_id, xmin::text::bigint AS mark, ROW({row}) AS line FROM {table}) AS each_row
{where} GROUP BY thread_id
"""
_STAMPS = """
SELECT thread_id, max(mark),
    max(digest) FILTER (WHERE part = 0),
    max(digest) FILTER (WHERE part = 1),
    max(digest) FILTER (WHERE part = 2),
    coalesce(max(count) FILTER (WHERE part = 0), 0), coalesce(max(count) FILTER (WHERE part = 1), 0)
FROM ({parts}) AS parts GROUP BY thread_id HAVING bool_or(part < 2) ORDER BY thread_id COLLATE "C"
"""
# A value may come later than a checkpoint that names its version. A number is text as Postgres writes it, but
# for one with a fraction.
_LATER_VALUES = """
SELECT EXISTS (
    SELECT FROM checkpoint_blobs b
    JOIN checkpoints c ON c.thread_id = b.thread_id AND c.checkpoint_ns = b.checkpoint_ns
    CROSS JOIN LATERAL (SELECT c.checkpoint -> 'channel_versions' -> b.channel AS version) AS named
    WHERE b.thread_id = %(thread)s AND b.xmin::text::bigint > %(mark)s
        AND c.thread_id = %(thread)s AND c.xmin::text::bigint <= %(mark)s
        AND (named.version #>> '{}' = b.version
            OR jsonb_typeof(named.version) = 'number' AND position('.' IN named.version #>> '{}') > 0)
)
"""
_OF_VERSIONS = """
AND thread_id = %s AND (checkpoint_ns, channel, version) IN (
    SELECT %s::text, * FROM unnest(%s::text[], %s::text[]))
"""
# On a standby the snapshot does not list which transactions are under way.
_VERSION = "SELECT pg_current_snapshot()::text || ' ' || coalesce(pg_last_wal_replay_lsn()::text, '')"

_SELF = "SELECT current_user::text, current_setting('transaction_read_only')"


def _parts(where: str) -> str:
    parts = (
        _PART.format(part=number, row=row, table=table, where=where)
        for number, (table, row) in enumerate(_ROWS)
    )
    return " UNION ALL ".join(parts)


class LiveSnapshot(PostgresSource):
    """One state of a database that goes on changing; see :class:`persistence.transfer.live.Snapshot`."""

    def stamps(self) -> Iterator[Stamp]:
        """See :class:`persistence.transfer.live.Snapshot`."""
        with self.errors():
            yield from map(_stamp, self.cursors.each("stamps", _STAMPS.format(parts=_parts(""))))

    def keys(self) -> Iterator[Stamp]:
        """See :class:`persistence.transfer.live.Snapshot`: a stamp shows all that a watch would."""
        return self.stamps()

    def stamp(self, thread: str) -> Stamp:
        """See :class:`persistence.transfer.live.Snapshot`."""
        statement = _STAMPS.format(parts=_parts("WHERE thread_id = %(thread)s"))
        with self.errors():
            (row,) = self.cursor().execute(statement.encode(), {"thread": thread}).fetchall()
        return _stamp(row)

    def kept(self, before: Stamp) -> tuple[bool, bool]:
        """See :class:`persistence.transfer.live.Snapshot`."""
        mark, *known = before.text.split(" ")
        args = {"thread": before.thread_id, "mark": int(mark)}
        statement = _parts("WHERE thread_id = %(thread)s AND mark <= %(mark)s")
        with self.errors():
            rows = self.cursor().execute(statement.encode(), args).fetchall()
            digests = {part: digest for _, part, _, _, digest in rows}
            checkpoints, writes, values = (digests.get(part, _NONE) == known[part] for part in range(3))
            if checkpoints and values:
                found = self.cursor().execute(_LATER_VALUES.encode(), args).fetchall()
                checkpoints = not found[0][0]
        return checkpoints and values, writes

    def since(self, before: Stamp, *, all_writes: bool) -> Iterator[Record]:
        """See :class:`persistence.transfer.live.Snapshot`."""
        thread, mark = before.thread_id, int(before.text.split(" ")[0])
        later = Where("AND thread_id = %s AND xmin::text::bigint > %s", (thread, mark))
        all_ = Where("AND thread_id = %s", (thread,))
        with self.errors():
            for ns, rows in groupby(self.rows(CHECKPOINTS, later), itemgetter(1)):
                yield from self._checkpoints(thread, ns, rows)
            for row in self.rows(self.writes(), all_ if all_writes else later):
                yield self.write(row, data=True)

    def _checkpoints(self, thread: str, ns: str, rows: Iterator[tuple[Any, ...]]) -> Iterator[Record]:
        """Checkpoints of a namespace, with all the values that they refer to."""
        held: dict[tuple[str, str | None], ValueRef | str] = {}
        seen: set[tuple[str, str]] = set()
        while some := list(islice(rows, _CHECKPOINTS_AT_ONCE)):
            versions = {version for row in some for version in self._versions(row)} - seen
            seen |= versions
            columns = [[one[n] for one in versions] for n in range(2)]
            blobs = Groups(self.rows(BLOBS, Where(_OF_VERSIONS, (thread, ns, *columns))), 2)
            yield from self.namespace(thread, ns, blobs, Groups(iter(some), 2), held, data=True)

    def _versions(self, row: tuple[Any, ...]) -> list[tuple[str, str]]:
        with suppress(NotCanonicalError):  # a reject, which has no values
            return list(checkpoint_of(row, {}, self._formats).versions.items())
        return []

    def noted(self, after: int) -> tuple[set[str], int]:
        """See :class:`persistence.transfer.live.Snapshot`: there is no watch."""
        return set(), after

    def shape(self) -> int:
        """See :class:`persistence.transfer.live.Snapshot`: nothing makes stamps worthless."""
        return 0

    def live_store(self) -> PostgresLiveStore:
        """See :class:`persistence.transfer.live.Snapshot`."""
        return PostgresLiveStore(self, self.conn, self._provider.settings.db_schema)


class _Lock(NamedTuple):
    """What a transaction has locked."""

    began: float
    tables: Sequence[seal.Place]


class LockedSnapshot(LiveSnapshot):
    """The state under a lock, read by the connection that holds it."""

    def __init__(self, provider: Provider, conn: Connection[Any], lock: _Lock) -> None:
        super().__init__(provider)
        self.cursors = Cursors(conn)
        self._locked = {place[:2] for place in lock.tables}
        self.began = lock.began

    def __enter__(self) -> LockedSnapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The transaction is that of :meth:`LiveDatabase.locked`."""

    def live_store(self) -> PostgresLiveStore:
        """See :class:`persistence.transfer.live.Snapshot`.

        Raises:
            TransferError: Tables of the store were made since the lock was taken.
        """
        there = {place[:2] for place in seal.places(self.conn, self._provider.settings.db_schema, seal.STORE)}
        if not there <= self._locked:
            raise TransferError(
                f"the store of {self.label} was set up during the cut-over",
                hint="it was not cut over, and its application goes on; run the command again",
            )
        return super().live_store()

    def seal(self, target: str) -> None:
        """See :class:`persistence.transfer.live.Locked`."""
        self.cursors.close()
        seal.seal(self.conn, self._provider.settings.db_schema, target)

    def unwatch(self) -> None:
        """See :class:`persistence.transfer.live.Locked`."""


class LiveDatabase:
    """A database that an application goes on writing to; see :class:`persistence.transfer.live.LiveSource`.

    A context manager. Between rounds it has no connection, as nobody says how long that may be idle.
    """

    def __init__(self, provider: Provider) -> None:
        self.label = str(provider.dsn)
        self._provider = provider
        self._schema = provider.settings.db_schema
        self._watched: tuple[str, ...] = ()

    def __enter__(self) -> LiveDatabase:
        with self.snapshot() as snapshot:
            self.name = snapshot.identity
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def version(self) -> int:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._connected() as conn:
            found = conn.cursor(row_factory=tuple_row).execute(_VERSION).fetchall()
        return int.from_bytes(hashlib.sha256(found[0][0].encode()).digest()[:8])

    def snapshot(self) -> LiveSnapshot:
        """See :class:`persistence.transfer.live.LiveSource`."""
        return LiveSnapshot(self._provider)

    def require(self, parts: Collection[Part], *, sealing: bool) -> None:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._connected() as conn:
            cursor = conn.cursor(row_factory=tuple_row)
            user, mode = cursor.execute(_SELF).fetchall()[0]
            if mode == "on":
                raise ConnectError(f"{self.label} can only be read", transient=False)
            tables = [*(seal.TABLES if "checkpoints" in parts else ())]
            tables += seal.STORE if "store" in parts else ()
            if lacking := _lacking(seal.places(conn, self._schema, tables), sealing=sealing):
                raise TransferError(
                    f"a cut-over needs {lacking}, and the role {user!r} does not have it: {self.label}",
                    hint="name a role in the source's DSN that has, such as the owner of the tables",
                )

    def watch(self) -> None:
        """See :class:`persistence.transfer.live.LiveSource`; stamps show everything here."""
        self._watched += seal.TABLES

    def watch_store(self) -> None:
        """See :class:`persistence.transfer.live.LiveSource`; stamps show everything here."""
        self._watched += seal.STORE

    def unwatch(self) -> None:
        """See :class:`persistence.transfer.live.LiveSource`."""
        self._watched = ()

    @contextmanager
    def locked(self) -> Iterator[Locked]:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._writing("EXCLUSIVE", self._watched) as (conn, lock):
            yield LockedSnapshot(self._provider, conn, lock)

    def sealed(self) -> bool:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._connected() as conn:
            return seal.is_sealed(conn, self._schema)

    def unseal(self) -> bool:
        """See :class:`persistence.transfer.live.LiveSource`."""
        with self._connected() as conn:
            tables = [place.table for place in seal.places(conn, self._schema) if place.sealed]
        if not tables:
            return False
        with self._writing("ACCESS EXCLUSIVE", tables) as (conn, _):
            seal.unseal(conn, self._schema)
        return True

    @contextmanager
    def _writing(self, mode: str, tables: Sequence[str]) -> Iterator[tuple[Connection[Any], _Lock]]:
        """A transaction that keeps writers out, committed at the end."""
        deadline = time.monotonic() + _LOCK_WAIT
        with self._connected() as conn:
            while (lock := _locked(conn, mode, self._schema, tables)) is None:
                if time.monotonic() > deadline:
                    raise ConnectError(
                        f"a transaction on the tables of {self.label} does not finish",
                        hint="look in pg_stat_activity for one that was left open, and run the command again",
                    )
                time.sleep(_PAUSE)
            try:
                yield conn, lock
                conn.execute("COMMIT")
            except BaseException:
                with suppress(psycopg.Error):
                    conn.execute("ROLLBACK")
                raise

    @contextmanager
    def _connected(self) -> Iterator[Connection[Any]]:
        try:
            with closing(connect(self._provider.dsn, self._provider.settings)) as conn:
                yield conn
        except psycopg.Error as error:
            reason = str(error).splitlines()[0]
            ours = translate(error, self.label)
            raise ours or TransferError(f"{self.label} refused it: {reason}") from None


def _locked(conn: Connection[Any], mode: str, schema: str | None, tables: Sequence[str]) -> _Lock | None:
    """Begin a transaction and try to lock the tables that are there; ``None`` where others were not done."""
    began = time.monotonic()
    # Each statement sees the tables as they are under the lock.
    conn.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    conn.execute(f"SET LOCAL lock_timeout = {_TRY_MILLISECONDS}".encode())
    # If this machine is gone, the lock goes soon.
    conn.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'".encode())
    conn.execute("SET LOCAL row_security = off")
    found = seal.places(conn, schema, tables)
    names = sql.SQL(", ").join(place.name for place in found)
    try:
        if found:
            conn.execute(sql.SQL(f"LOCK TABLE {{}} IN {mode} MODE").format(names))
    except (errors.LockNotAvailable, errors.DeadlockDetected):
        conn.execute("ROLLBACK")
        return None
    return _Lock(began, found)


def _lacking(places: Sequence[seal.Place], *, sealing: bool) -> str | None:
    """The first right that a cut-over would need."""
    for place in places:
        if not place.lock:
            return f"the right UPDATE or DELETE on {place.table}, to lock it"
        if sealing and not place.trigger:
            return f"the right TRIGGER on {place.table}, to seal it"
        if sealing and not place.create:
            return f"the right CREATE on the schema {place.schema}, to seal it"
    return None


def _stamp(row: tuple[Any, ...]) -> Stamp:
    thread, mark, *digests, checkpoints, writes = row
    return Stamp(thread, " ".join([str(mark), *(d or _NONE for d in digests)]), checkpoints, writes)
