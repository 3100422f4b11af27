"""SQLite as a target that is kept equal to a source, thread by thread, each with its stamp."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from persistence.backends.sqlite.transfer import LISTED, LISTED_WRITES, ThreadReader, write_of
from persistence.errors import TransferError
from persistence.transfer.keys import marked, pack_part
from persistence.transfer.live import Change, Place, Stamp, claimed
from persistence.transfer.records import Checkpoint, Reject, Value, Write

if TYPE_CHECKING:
    from persistence.backends.sqlite.transfer_sink import SqliteSink

_SHOWN = 3
_AT = "thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
_ROWS = """
SELECT (SELECT count(*) FROM checkpoints WHERE thread_id = ?1),
    (SELECT count(*) FROM writes WHERE thread_id = ?1)
"""
_NOTE_KEYS = """
INSERT INTO persistence_followed_keys (run_id, thread_id, part_no, forgets, keys)
SELECT ?1, ?2, (SELECT count(*) FROM persistence_followed_keys WHERE run_id = ?1 AND thread_id = ?2), ?3, ?4
"""
_MISCOUNTED = f"""
SELECT thread_id FROM persistence_followed f WHERE run_id = ? AND (
    checkpoints <> (SELECT count(*) FROM checkpoints c WHERE c.thread_id = f.thread_id)
    OR writes <> (SELECT count(*) FROM writes w WHERE w.thread_id = f.thread_id)) LIMIT {_SHOWN}
"""


class SqliteFollower:
    """The threads that one run has brought; see :class:`persistence.transfer.live.Follower`."""

    def __init__(self, sink: SqliteSink, run_id: str) -> None:
        self._sink = sink
        self._run_id = run_id

    def claims(self, after: str | None, limit: int) -> list[Stamp]:
        """See :class:`persistence.transfer.live.Follower`."""
        return claimed(self._sink, self._run_id, after, limit)

    def claim(self, stamps: Sequence[Stamp]) -> None:
        """See :class:`persistence.transfer.live.Follower`."""
        with self._sink.transaction() as conn:
            for stamp in stamps:
                self._note(conn, stamp)

    def apply(self, changes: Sequence[Change]) -> None:
        """See :class:`persistence.transfer.live.Follower`."""
        with self._sink.transaction() as conn:
            for change in changes:
                self._apply(conn, change)

    def _apply(self, conn: sqlite3.Connection, change: Change) -> None:
        thread = (change.thread_id,)
        key = (self._run_id, change.thread_id)
        where = "FROM persistence_followed WHERE run_id = ? AND thread_id = ?"
        stamp = conn.execute(f"SELECT stamp {where}", key).fetchone()
        checkpoints, writes = conn.execute(_ROWS, thread).fetchone()
        change.require(stamp[0] if stamp else None, checkpoints, writes, self._sink.label)
        if change.kind in ("replace", "drop"):
            conn.execute("DELETE FROM checkpoints WHERE thread_id = ?", thread)
        if change.kind in ("replace", "drop") or change.rewrite:
            conn.execute("DELETE FROM writes WHERE thread_id = ?", thread)
        conn.execute(f"DELETE {where}", key)
        if change.after is not None:
            self._note(conn, change.after)
        inserted = []
        for record in self._sink.placed(change.records()):
            if isinstance(record, Reject):
                raise TransferError("the source changed while it was read")
            self._sink.insert(conn, record)
            if not isinstance(record, Value):  # which has no row here
                inserted.append(marked(record))
        if change.kind in ("replace", "drop"):
            conn.execute("DELETE FROM persistence_followed_keys WHERE run_id = ? AND thread_id = ?", key)
        if change.inserts:
            conn.execute(_NOTE_KEYS, (*key, change.forgets, pack_part(inserted)))

    def held(self, checkpoints: Collection[Place], writes: Collection[Place]) -> Iterator[Checkpoint | Write]:
        """See :class:`persistence.transfer.live.Follower`."""
        with self._sink.errors(), self._sink.reader() as conn:
            for place in checkpoints:
                rows = conn.execute(f"SELECT {LISTED} FROM checkpoints WHERE {_AT}", place)
                for record in ThreadReader(place[0], self._sink.formats).checkpoints(rows, data=False):
                    if isinstance(record, Checkpoint):
                        yield record
            for place in writes:
                for row in conn.execute(f"SELECT {LISTED_WRITES} FROM writes WHERE {_AT}", place):
                    if isinstance(write := write_of(row, self._sink.formats, data=False), Write):
                        yield write

    def miscounted(self) -> list[str]:
        """See :class:`persistence.transfer.live.Follower`."""
        return [thread for (thread,) in self._sink.query(_MISCOUNTED, [self._run_id])]

    def _note(self, conn: sqlite3.Connection, stamp: Stamp) -> None:
        conn.execute(
            "INSERT OR REPLACE INTO persistence_followed (thread_id, stamp, checkpoints, writes, run_id)"
            " VALUES (?, ?, ?, ?, ?)",
            (*stamp, self._run_id),
        )
