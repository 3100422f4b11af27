"""SQLite as the source of a transfer: read-only, one snapshot, nothing left behind.

Row formats: ``langgraph-checkpoint-sqlite`` 3.1.2. A checkpoint is one msgpack map, which is cut into
its values as bytes; no class of the application is imported and none of its code runs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from persistence.backends.sqlite.transfer_damaged import named, nameless, readable, rejected
from persistence.backends.sqlite.transfer_file import (
    Unlocked,
    is_idle_wal,
    open_snapshot,
    place_of,
    require_file,
)
from persistence.backends.sqlite.transfer_store import SqliteStoreSource, has_table
from persistence.errors import SourceError
from persistence.transfer.canonical import (
    Facts,
    NotCanonicalError,
    body_fields,
    canonical_json,
    content_hash,
    facts,
    split_usual,
    typed_facts,
    version_text,
)
from persistence.transfer.formats import Formats, Typed
from persistence.transfer.records import Checkpoint, Record, Reject, Value, ValueRef, Write, make

if TYPE_CHECKING:
    from types import TracebackType

    from persistence.contract import Provider
    from persistence.transfer.semantic import Official
    from persistence.transfer.workers import Open

_NEEDED = {
    "checkpoints": {
        "thread_id",
        "checkpoint_ns",
        "checkpoint_id",
        "parent_checkpoint_id",
        "type",
        "checkpoint",
        "metadata",
    },
    "writes": {
        "thread_id",
        "checkpoint_ns",
        "checkpoint_id",
        "task_id",
        "idx",
        "channel",
        "type",
        "value",
    },
}
LISTED = "thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata"
"""The columns of a checkpoint, as :class:`ThreadReader` reads them."""
LISTED_WRITES = "thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, value"
"""The columns of a write, as :func:`write_of` reads them."""
_THREADS = "SELECT thread_id FROM checkpoints UNION SELECT thread_id FROM writes ORDER BY thread_id"


class SqliteSource:
    """One consistent snapshot of a SQLite checkpoint database.

    A context manager. The file is never created, changed or switched to another journal mode.
    """

    database = None
    divisible = True

    def __init__(
        self,
        provider: Provider,
        seen: Mapping[str, object] | None = None,
        *,
        allow_pickle: bool = False,
        formats: Formats | None = None,
    ) -> None:
        self.label = str(provider.dsn)
        self._provider = provider
        self._path = provider.dsn.path
        self._expected = seen
        self._settings = provider.settings
        self._allow_pickle = allow_pickle
        self._formats = formats or Formats(
            provider.settings, allow_pickle=allow_pickle, unpickle=allow_pickle
        )

    def __enter__(self) -> Self:
        if self._path is None:
            raise SourceError(f"{self.label} is in memory, so there is nothing to read")
        path = Path(self._path)
        require_file(path, self.label)
        with ExitStack() as stack:
            self._unlocked = Unlocked(path) if is_idle_wal(path) else None
            if self._expected is not None and (
                self._unlocked is None or self._unlocked.seen != self._expected
            ):
                raise self._was_changed()
            self._conn = open_snapshot(path, stack, self.label, immutable=self._unlocked is not None)
            with self._reading():
                self._has_task_path = self._check_tables()
            self._stack = stack.pop_all()
        return self

    @classmethod
    def on(cls, conn: sqlite3.Connection, label: str, formats: Formats) -> SqliteSource:
        """What a transaction of somebody else's sees."""
        source = cls.__new__(cls)
        source.label, source._conn, source._unlocked = label, conn, None
        source._formats = formats
        source._has_task_path = source._check_tables()
        return source

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def encrypted(self) -> bool:
        """See :class:`persistence.transfer.records.Source`."""
        return self._formats.encrypts

    @property
    def size(self) -> int:
        """See :class:`persistence.transfer.records.Source`."""
        return Path(self._path or "").stat().st_size

    @property
    def converted(self) -> int:
        """See :class:`persistence.transfer.records.Source`."""
        return self._formats.converted

    def drift(self) -> list[str]:
        """See :class:`persistence.transfer.records.Source`."""
        from persistence.backends.sqlite.tables import REQUIRED

        found: list[str] = []
        with self._reading():
            for table in _NEEDED:
                rows = self._conn.execute(f"SELECT name, pk FROM pragma_table_info('{table}')").fetchall()
                for column in sorted(REQUIRED[table].columns - {name for name, _ in rows}):
                    found.append(f"table {table} has no column {column}")
                key = tuple(name for position, name in sorted((pk, name) for name, pk in rows if pk))
                if key != REQUIRED[table].primary_key:
                    found.append(f"table {table} has primary key ({', '.join(key)})")
        return found

    def threads(self) -> Iterator[str]:
        """See :class:`persistence.transfer.records.Source`."""
        with self._reading():
            rows = self._conn.execute(_THREADS)
            called: set[str] = set()  # a name that we have given comes where its bytes sort
            for thread, _ in _by_thread(readable(self._conn, rows, lambda _, row: (named(row[0]),))):
                if "\\x" in thread:
                    if thread in called:
                        continue
                    called.add(thread)
                yield thread

    def count(self, threads: Sequence[str] | None = None) -> int:
        """See :class:`persistence.transfer.records.Source`."""
        counted = "SELECT count(*) FROM checkpoints"
        with self._reading():
            if threads is None:
                return int(self._conn.execute(counted).fetchone()[0])
            each = (self._conn.execute(f"{counted} WHERE thread_id = ?", (thread,)) for thread in threads)
            return sum(rows.fetchone()[0] for rows in each)

    def records(self, threads: Sequence[str] | None = None, *, data: bool = True) -> Iterator[Record]:
        """See :class:`persistence.transfer.records.Source`."""
        with self._unchanged():
            for thread in [None] if threads is None else self._stored(threads):
                yield from chain.from_iterable(self._merge(thread, data=data))

    def _stored(self, threads: Sequence[str]) -> Iterator[str | bytes]:
        """What threads are called in the file: one may only have got its name by us."""
        for thread in threads:
            yield thread
            if "\\x" in thread:
                yield from self._nameless.get(thread, ())

    @cached_property
    def _nameless(self) -> Mapping[str, Sequence[bytes]]:
        return nameless(self._conn, _THREADS)

    def store(self) -> SqliteStoreSource:
        """See :class:`persistence.transfer.records.Source`."""
        return SqliteStoreSource(self._conn, self._unchanged)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        with self._reading():
            yield
        if self._unlocked is not None and self._unlocked.changed():
            raise self._was_changed()

    def share(self) -> Open | None:
        """See :mod:`persistence.transfer.workers`. A snapshot of a file in use is one connection's own."""
        return (
            None
            if self._unlocked is None
            else partial(SqliteSource, self._provider, self._unlocked.seen, allow_pickle=self._allow_pickle)
        )

    def _was_changed(self) -> SourceError:
        return SourceError(
            f"{self.label} was written to while it was read",
            hint="stop the application, or keep it connected, and run the command again",
        )

    @property
    def identity(self) -> str:
        """See :class:`persistence.transfer.records.Source`."""
        return f"sqlite:{Path(self._path or '').stat().st_ino}"

    @property
    def place(self) -> str:
        """See :class:`persistence.transfer.records.Source`."""
        return place_of(Path(self._path or ""))

    def marks(self, after: str | None, upto: str) -> list[int]:
        """See :class:`persistence.transfer.records.Source`. A row that is replaced gets another rowid."""
        found: list[int] = []
        with self._reading():
            for table in _NEEDED:
                found += self._conn.execute(
                    f"SELECT count(*), coalesce(sum(rowid), 0) FROM {table}"
                    " WHERE thread_id <= ?1 AND (?2 IS NULL OR thread_id > ?2)",
                    (upto, after),
                ).fetchone()
        return found

    def official(self) -> Official:
        """See :class:`persistence.transfer.records.Source`."""
        from persistence.backends.sqlite.transfer_official import SqliteOfficial

        with self._reading():
            for thread in self._nameless:  # which that saver would not see
                raise SourceError(f"thread {thread!r} of {self.label} has an id that is not UTF-8")
        return SqliteOfficial(self._conn, self._settings, self.label, task_path=self._has_task_path)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise SourceError(f"cannot read {self.label}: {error}") from None

    def _merge(
        self, thread: str | bytes | None, *, data: bool, after: tuple[int, int] | None = None
    ) -> Iterator[Iterator[Record]]:
        """Each thread's checkpoints, then its writes: two cursors over the two primary keys.

        Each part is to be read before the next one is asked for. With ``after`` only the rows of one thread
        that came after these rowids, one for each table.
        """
        checkpoints = _by_thread(self._checkpoint_rows(thread, after and after[0]))
        writes = _by_thread(self._write_rows(thread, after and after[1]))
        next_checkpoints, next_writes = next(checkpoints, None), next(writes, None)
        while next_checkpoints or next_writes:
            current = min(group[0] for group in (next_checkpoints, next_writes) if group)
            if next_checkpoints and next_checkpoints[0] == current:
                yield ThreadReader(current, self._formats).checkpoints(next_checkpoints[1], data=data)
                next_checkpoints = next(checkpoints, None)
            if next_writes and next_writes[0] == current:
                yield (write_of(row, self._formats, data=data) for row in next_writes[1])
                next_writes = next(writes, None)

    def _checkpoint_rows(self, thread: str | bytes | None, after: int | None) -> Iterator[tuple[Any, ...]]:
        where, args = _where(thread, after)
        rows = self._conn.execute(
            f"SELECT {LISTED} FROM checkpoints {where} ORDER BY thread_id, checkpoint_ns, checkpoint_id",
            args,
        )
        return readable(self._conn, rows, rejected)

    def _write_rows(self, thread: str | bytes | None, after: int | None) -> Iterator[tuple[Any, ...]]:
        where, args = _where(thread, after)
        columns = LISTED_WRITES if self._has_task_path else LISTED_WRITES.replace("task_path", "''")
        rows = self._conn.execute(
            f"SELECT {columns} FROM writes {where}"
            " ORDER BY thread_id, checkpoint_ns, checkpoint_id, task_id, idx",
            args,
        )
        return readable(self._conn, rows, rejected)

    def _check_tables(self) -> bool:
        """Refuse a database that is not LangGraph's; whether writes have a task path."""
        columns = {
            table: {row[1] for row in self._conn.execute(f"PRAGMA table_info({table})")} for table in _NEEDED
        }
        if not any(columns.values()) and has_table(self._conn, "store"):
            return False  # a file that only a store uses
        if not any(columns.values()):
            raise SourceError(
                f"{self.label} is an empty database: it has no LangGraph tables",
                hint="check the path; a checkpoint database has the tables checkpoints and writes",
            )
        require_plain_order(self._conn, self.label)
        missing = [f"{t}.{c}" for t, needed in _NEEDED.items() for c in sorted(needed - columns[t])]
        if missing:
            raise SourceError(
                f"{self.label} is not a LangGraph checkpoint database: missing {', '.join(missing)}"
            )
        return "task_path" in columns["writes"]


def require_plain_order(conn: sqlite3.Connection, label: str) -> None:
    """Raise where text is not sorted and compared as everywhere else: by the bytes of its UTF-8.

    Raises:
        SourceError: The file has another encoding, or a table of LangGraph's another collation.
    """
    (encoding,) = conn.execute("PRAGMA encoding").fetchone()
    tables = "SELECT 1 FROM sqlite_master WHERE name IN ('checkpoints', 'writes', 'store') AND sql LIKE ?"
    if encoding != "UTF-8" or conn.execute(tables, ("%collate%",)).fetchone():
        raise SourceError(
            f"{label} sorts its text in another way than LangGraph's files: {encoding}, or says COLLATE",
            hint="copy the rows into a new file whose tables LangGraph's saver has made",
        )


def _where(thread: str | bytes | None, after: int | None) -> tuple[str, tuple[object, ...]]:
    if thread is None:
        return "", ()
    if after is None:
        return "WHERE thread_id = CAST(? AS TEXT)", (thread,)
    # The plus keeps SQLite from taking the rowid for the way in: the index has the order.
    return "WHERE thread_id = ? AND +rowid > ?", (thread, after)


class _Cached(NamedTuple):
    version: str | None
    raw: msgspec.Raw
    ref: ValueRef


class ThreadReader:
    """Turns one thread's checkpoint rows into records.

    SQLite repeats the whole state in every checkpoint. A value equal to the one its channel had
    before is not hashed again: comparing bytes is twenty times as fast.
    """

    def __init__(self, thread_id: str, formats: Formats) -> None:
        self._thread_id = thread_id
        self._formats = formats
        self._ns: str | None = None
        self._last: dict[str, _Cached] = {}
        self._sent: set[tuple[str, str, str, bytes]] = set()

    def checkpoints(self, rows: Iterator[tuple[Any, ...]], *, data: bool) -> Iterator[Record]:
        """The records of rows, which come in order."""
        for row in rows:
            if type(row) is Reject:
                yield row
                continue
            if row[1] != self._ns:
                self._ns = row[1]
                self._last.clear()
                self._sent.clear()
            try:
                values, checkpoint = self._split(row, data=data)
            except NotCanonicalError as error:
                yield Reject(self._thread_id, row[1], row[2], str(error), _raw(row))
                continue
            yield from values
            yield checkpoint

    def _split(self, row: tuple[Any, ...], *, data: bool) -> tuple[list[Value], Checkpoint]:
        _, ns, checkpoint_id, parent_id, type_, checkpoint, metadata = row
        if not type(ns) is type(checkpoint_id) is str or not (parent_id is None or type(parent_id) is str):
            _require_text(ns, checkpoint_id, parent_id or "")
        typed: Mapping[str, Typed] = {}
        usual = split_usual(checkpoint) if type_ in self._formats.plain_types else None
        if usual is not None:
            channels, versions, body_json = usual
        else:
            _, channels, typed = opened = self._formats.row(type_, checkpoint)
            body, body_json = body_fields(opened.fields)
            named = body.get("channel_versions", {})
            if not isinstance(named, dict):
                raise NotCanonicalError("channel_versions is not a map")
            versions = {channel: version_text(version) for channel, version in named.items()}
        values: list[Value] = []
        new = values if data else None
        refs: list[ValueRef] = []
        before = self._last
        for channel in sorted(channels):
            raw, version, last = channels[channel], versions.get(channel), before.get(channel)
            if last is None or last[1] != raw or last[0] != version:
                held = bytes(raw)  # without the rest of the row
                ref = self._ref(channel, version, facts(held), new)
                last = before[channel] = make(_Cached, (version, msgspec.Raw(held), ref))
            refs.append(last[2])
        if typed:
            for channel, value in sorted(typed.items()):
                refs.append(self._ref(channel, versions.get(channel), typed_facts(*value), new))
            refs.sort()
        fields = (*row[:4], body_json, _metadata(metadata), versions, tuple(refs))
        return values, make(Checkpoint, fields)

    def _ref(self, channel: str, version: str | None, value: Facts, new: list[Value] | None) -> ValueRef:
        """What a checkpoint holds; a value that was not sent before is added to ``new``."""
        type_, data, digest, delta, scalar = value
        if version is None or scalar:
            return make(ValueRef, (channel, version, type_, digest, data, len(data), delta))
        if new is not None and (key := (channel, version, type_, digest)) not in self._sent:
            self._sent.add(key)
            new.append(make(Value, (self._thread_id, self._ns or "", *key, data)))
        return make(ValueRef, (channel, version, type_, digest, None, len(data), delta))


def write_of(row: tuple[Any, ...], formats: Formats, *, data: bool) -> Write | Reject:
    """A row as a record."""
    if type(row) is Reject:
        return row
    thread_id, ns, checkpoint_id, task_id, idx, task_path, channel, type_, value = row
    try:
        if not type(ns) is type(checkpoint_id) is type(task_id) is type(task_path) is type(channel) is str:
            _require_text(ns, checkpoint_id, task_id, task_path, channel)
        if not isinstance(idx, int):
            raise NotCanonicalError(f"the index of a write is stored as {type(idx).__name__}")
        if type_ not in formats.plain_types or not isinstance(value, bytes):
            type_, value = formats.value(f"write to channel {channel!r}", type_, value)
    except NotCanonicalError as error:
        return Reject(thread_id, ns, checkpoint_id, str(error), _raw(row))
    return make(Write, (*row[:7], type_, content_hash(value), value if data else None))


def _raw(row: tuple[Any, ...]) -> bytes:
    return msgspec.msgpack.encode(row)


def _require_text(*values: object) -> None:
    for value in values:
        if not isinstance(value, str):
            raise NotCanonicalError(f"an id is stored as {type(value).__name__}, not as text: {value!r}")


def _metadata(metadata: object) -> bytes:
    if metadata is None:
        return b"{}"
    if not isinstance(metadata, bytes | str):
        raise NotCanonicalError(f"the metadata is stored as {type(metadata).__name__}, not as JSON")
    try:
        return canonical_json(metadata)
    except NotCanonicalError as error:
        raise NotCanonicalError(f"the metadata is not JSON: {error}") from None


def _by_thread(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[str, Iterator[tuple[Any, ...]]]]:
    """Group sorted rows by their first column without holding a group in memory."""
    row = next(rows, None)
    while row is not None:
        thread = row[0]
        if not isinstance(thread, str):
            raise SourceError(f"a thread id is stored as {type(thread).__name__}, not as text: {thread!r}")

        def group(thread: str = thread) -> Iterator[tuple[Any, ...]]:
            nonlocal row
            while row is not None and row[0] == thread:
                yield row
                row = next(rows, None)

        yield thread, group()
        while row is not None and row[0] == thread:
            row = next(rows, None)
