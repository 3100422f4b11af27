"""Postgres as a target that is kept equal to a source, thread by thread, each with its stamp."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from persistence.backends.postgres.transfer_source import checkpoint_of
from persistence.errors import TransferError
from persistence.transfer.canonical import is_delta
from persistence.transfer.formats import Formats
from persistence.transfer.keys import Key, marked, pack_part
from persistence.transfer.live import Change, Place, Stamp, claimed
from persistence.transfer.records import Checkpoint, Reject, Value, ValueRef, Write

if TYPE_CHECKING:
    from psycopg import Cursor

    from persistence.backends.postgres.transfer_sink import PostgresSink

_RECORDS = 5_000
_BYTES = 8_000_000
_PLACES = 1_000
_SHOWN = 3
_ROWS = """
SELECT t.id, coalesce(c.n, 0), coalesce(w.n, 0)
FROM unnest(%(threads)s::text[]) AS t (id)
LEFT JOIN (
    SELECT thread_id, count(*) AS n FROM checkpoints
    WHERE thread_id = ANY(%(threads)s) GROUP BY thread_id
) c ON c.thread_id = t.id
LEFT JOIN (
    SELECT thread_id, count(*) AS n FROM checkpoint_writes
    WHERE thread_id = ANY(%(threads)s) GROUP BY thread_id
) w ON w.thread_id = t.id
"""
_AT = "unnest(%s::text[], %s::text[], %s::text[]) AS k (thread_id, checkpoint_ns, checkpoint_id)"
_CHECKPOINTS = f"""
SELECT c.thread_id, c.checkpoint_ns, c.checkpoint_id, c.parent_checkpoint_id, c.checkpoint::text,
    c.metadata::text
FROM {_AT} JOIN checkpoints c USING (thread_id, checkpoint_ns, checkpoint_id)
"""
_WRITES = f"""
SELECT w.thread_id, w.checkpoint_ns, w.checkpoint_id, w.task_id, w.idx, w.task_path, w.channel, w.type,
    sha256(w.blob), CASE WHEN w.type = ANY(%s) THEN NULL ELSE w.blob END
FROM {_AT} JOIN checkpoint_writes w USING (thread_id, checkpoint_ns, checkpoint_id)
"""
_OF_VERSIONS = """
FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]) AS k (thread_id, checkpoint_ns, channel, version)
JOIN checkpoint_blobs b USING (thread_id, checkpoint_ns, channel, version)
"""
_BLOBS = f"""
SELECT b.thread_id, b.checkpoint_ns, b.channel, b.version, b.type, sha256(coalesce(b.blob, '')),
    substring(b.blob FROM 1 FOR 6), octet_length(b.blob),
    CASE WHEN b.type = ANY(%s) THEN NULL ELSE b.blob END {_OF_VERSIONS} WHERE b.type <> 'empty'
"""
_STORED = f"SELECT b.thread_id, b.checkpoint_ns, b.channel, b.version {_OF_VERSIONS}"
_FORGET_KEYS = "DELETE FROM persistence_followed_keys WHERE run_id = %s AND thread_id = ANY(%s)"
_NOTE_KEYS = """
INSERT INTO persistence_followed_keys (run_id, thread_id, part_no, forgets, keys)
SELECT %s, t.id,
    (SELECT count(*) FROM persistence_followed_keys k WHERE k.run_id = %s AND k.thread_id = t.id),
    t.forgets, t.keys
FROM unnest(%s::text[], %s::text[], %s::bytea[]) AS t (id, forgets, keys)
"""
_MISCOUNTED = f"""
SELECT f.thread_id FROM persistence_followed f
LEFT JOIN (SELECT thread_id, count(*) AS n FROM checkpoints GROUP BY thread_id) c ON c.thread_id = f.thread_id
LEFT JOIN (SELECT thread_id, count(*) AS n FROM checkpoint_writes GROUP BY thread_id) w
    ON w.thread_id = f.thread_id
WHERE f.run_id = ? AND (f.checkpoints <> coalesce(c.n, 0) OR f.writes <> coalesce(w.n, 0)) LIMIT {_SHOWN}
"""


class PostgresFollower:
    """The threads that one run has brought; see :class:`persistence.transfer.live.Follower`."""

    def __init__(self, sink: PostgresSink, run_id: str) -> None:
        self._sink = sink
        self._run_id = run_id

    def claims(self, after: str | None, limit: int) -> list[Stamp]:
        """See :class:`persistence.transfer.live.Follower`. The column sorts by code point."""
        return claimed(self._sink, self._run_id, after, limit)

    def claim(self, stamps: Sequence[Stamp]) -> None:
        """See :class:`persistence.transfer.live.Follower`."""
        with self._sink.transaction() as cursor:
            self._note(cursor, [stamp.thread_id for stamp in stamps], stamps)

    def apply(self, changes: Sequence[Change]) -> None:
        """See :class:`persistence.transfer.live.Follower`."""
        threads = [change.thread_id for change in changes]
        gone = [change.thread_id for change in changes if change.kind in ("replace", "drop")]
        rewritten = [change.thread_id for change in changes if change.rewrite]
        with self._sink.transaction() as cursor:
            self._require_ours(cursor, changes)
            if gone:
                self._sink.clear(cursor, gone)
            if rewritten:
                cursor.execute("DELETE FROM checkpoint_writes WHERE thread_id = ANY(%s)", [rewritten])
            self._note(cursor, threads, [change.after for change in changes if change.after])
            adding = {change.thread_id for change in changes if change.kind == "add"}
            records = self._sink.placed(record for change in changes for record in change.records())
            inserted: dict[str, list[tuple[Key, bytes]]] = {thread: [] for thread in threads}
            for chunk in _chunks(records):
                lacking = self._lacking(cursor, chunk, adding)
                self._sink.insert(cursor, lacking)
                for record in lacking:
                    inserted[record.thread_id].append(marked(record))
            if gone:
                cursor.execute(_FORGET_KEYS, [self._run_id, gone])
            noted = [
                (change.thread_id, change.forgets, pack_part(inserted[change.thread_id]))
                for change in changes
                if change.inserts
            ]
            if noted:
                cursor.execute(_NOTE_KEYS, [self._run_id, self._run_id, *_columns(noted)])

    def held(self, checkpoints: Collection[Place], writes: Collection[Place]) -> Iterator[Checkpoint | Write]:
        """See :class:`persistence.transfer.live.Follower`."""
        with self._sink.transaction() as cursor:
            for some in _some(checkpoints):
                yield from _checkpoints(cursor, some, self._sink.formats)
            for some in _some(writes):
                yield from _writes(cursor, some, self._sink.formats)

    def miscounted(self) -> list[str]:
        """See :class:`persistence.transfer.live.Follower`."""
        return [thread for (thread,) in self._sink.query(_MISCOUNTED, [self._run_id])]

    def _require_ours(self, cursor: Cursor[tuple[Any, ...]], changes: Sequence[Change]) -> None:
        """Raise where a thread is not as this run left it."""
        threads = [change.thread_id for change in changes]
        cursor.execute(
            "SELECT thread_id, stamp FROM persistence_followed WHERE run_id = %s AND thread_id = ANY(%s)"
            " FOR UPDATE",
            [self._run_id, threads],
        )
        stamps = dict(cursor.fetchall())
        cursor.execute(_ROWS.encode(), {"threads": threads})
        rows = {thread: counts for thread, *counts in cursor.fetchall()}
        for change in changes:
            checkpoints, writes = rows[change.thread_id]
            change.require(stamps.get(change.thread_id), checkpoints, writes, self._sink.label)

    def _note(self, cursor: Cursor[tuple[Any, ...]], threads: Sequence[str], stamps: Sequence[Stamp]) -> None:
        """Stamps in place of those that the threads had; one without is given up."""
        cursor.execute(
            "DELETE FROM persistence_followed WHERE run_id = %s AND thread_id = ANY(%s)",
            [self._run_id, list(threads)],
        )
        cursor.execute(
            "INSERT INTO persistence_followed (run_id, thread_id, stamp, checkpoints, writes)"
            " SELECT %s, * FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[])",
            [self._run_id, *(_columns(stamps) or ([], [], [], []))],
        )

    def _lacking(
        self, cursor: Cursor[tuple[Any, ...]], records: Sequence[Value | Checkpoint | Write], adding: set[str]
    ) -> list[Value | Checkpoint | Write]:
        """The records without the values that are stored already."""
        keys = {(*r[:2], r.channel, r.version) for r in records if isinstance(r, Value) and r[0] in adding}
        if not keys:
            return list(records)
        stored = set(cursor.execute(_STORED.encode(), _columns(list(keys))).fetchall())
        return [r for r in records if not (isinstance(r, Value) and (*r[:2], r.channel, r.version) in stored)]


def _checkpoints(
    cursor: Cursor[tuple[Any, ...]], places: Sequence[Place], formats: Formats
) -> Iterator[Checkpoint]:
    """Checkpoints as records, whose values are hashed where they lie, unless they are encrypted."""
    rows = cursor.execute(_CHECKPOINTS.encode(), _columns(places)).fetchall()
    versions = {
        (*row[:2], *version) for row in rows for version in checkpoint_of(row, {}, formats).versions.items()
    }
    held: dict[tuple[str, str], dict[tuple[str, str | None], ValueRef | str]] = {}
    if versions:
        cursor.execute(_BLOBS.encode(), [list(formats.plain_types), *_columns(list(versions))])
        for thread, ns, channel, version, type_, digest, start, size, blob in cursor.fetchall():
            if blob is not None:
                type_, blob = formats.value("value", type_, blob)
                digest, start, size = hashlib.sha256(blob).digest(), blob[:6], len(blob)
            delta = type_ == "msgpack" and is_delta(bytes(start or b""))
            ref = ValueRef(channel, version, type_, digest, None, size or 0, delta)
            held.setdefault((thread, ns), {})[channel, version] = ref
    for row in rows:
        yield checkpoint_of(row, held.get(row[:2], {}), formats)


def _writes(cursor: Cursor[tuple[Any, ...]], places: Sequence[Place], formats: Formats) -> Iterator[Write]:
    cursor.execute(_WRITES.encode(), [list(formats.plain_types), *_columns(places)])
    for *key, type_, digest, blob in cursor.fetchall():
        if blob is not None:
            type_, blob = formats.value("write", type_, blob)
            digest = hashlib.sha256(blob).digest()
        yield Write._make((*key, type_, digest, None))


def _chunks(records: Iterable[Any]) -> Iterator[list[Value | Checkpoint | Write]]:
    """Records, as many at a time as one COPY takes."""
    chunk: list[Value | Checkpoint | Write] = []
    size = 0
    for record in records:
        if isinstance(record, Reject):
            raise TransferError("the source changed while it was read")
        chunk.append(record)
        size += len(record.body) if isinstance(record, Checkpoint) else len(record.data or b"")
        if len(chunk) >= _RECORDS or size >= _BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _some(places: Collection[Place]) -> Iterator[list[Place]]:
    left = iter(places)
    while some := list(islice(left, _PLACES)):
        yield some


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]
