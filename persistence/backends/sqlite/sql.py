"""What the SQLite savers do on a connection: the statements, in the official saver's tables."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.serde.types import TASKS

from persistence import rules
from persistence.backends.sqlite.codec import Codec, load_metadata
from persistence.errors import ConflictError
from persistence.lineage import Needs, Node, Place, Plan, prune_needs, prune_plan, runs_needs, runs_plan
from persistence.rules import Typed, version_text

_COLUMNS = "thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata"
_AT = "thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
_PUT = f"INSERT OR REPLACE INTO checkpoints ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
_PUT_WRITE = """
    INSERT INTO writes
        (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, value)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO """
_KEEP_WRITE = _PUT_WRITE + "NOTHING"
_REPLACE_WRITE = (
    _PUT_WRITE
    + """UPDATE SET task_path = excluded.task_path, channel = excluded.channel,
        type = excluded.type, value = excluded.value"""
)
_WRITES = f"SELECT task_path, task_id, idx, channel, type, value FROM writes WHERE {_AT}"
_FIRST_PAGE = 16
_LARGEST_PAGE = 128


@dataclass(frozen=True, slots=True)
class Row:
    """A checkpoint as stored, with its writes and, in old formats, its parent's sends."""

    key: tuple[str, str, str]
    parent: str | None
    checkpoint: Typed
    metadata: bytes | str | None
    writes: list[tuple[str, str, int, str, str, bytes]]
    sends: list[tuple[str, str, int, str, str, bytes]]


def put(conn: sqlite3.Connection, put: rules.Put, given: Mapping[str, Any], codec: Codec) -> None:
    """Store a checkpoint, with the stored values of the channels that keep theirs."""
    values = dict(given)
    values.update(_stored(conn, put, codec))
    type_, blob = codec.seal(put.body, values if put.has_values or values else None)
    metadata = json.dumps(put.metadata, ensure_ascii=False).encode()
    conn.execute(_PUT, (put.thread, put.ns, put.id, put.parent, type_, blob, metadata))


def put_writes(
    conn: sqlite3.Connection, key: rules.Key, task: str, path: str, writes: Iterable[rules.Write]
) -> None:
    """Store writes, each by its own rule: first wins, or last wins for the special ones."""
    for write in writes:
        conn.execute(
            _REPLACE_WRITE if write.idx < 0 else _KEEP_WRITE,
            (
                key.thread,
                key.ns,
                key.checkpoint,
                task,
                path,
                write.idx,
                write.channel,
                write.type,
                write.blob,
            ),
        )


def get(conn: sqlite3.Connection, key: rules.Key) -> Row | None:
    """The row of a checkpoint, or of the latest."""
    sql = f"SELECT {_COLUMNS} FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?"
    if key.checkpoint is None:
        found = conn.execute(f"{sql} ORDER BY checkpoint_id DESC LIMIT 1", (key.thread, key.ns)).fetchone()
    else:
        found = conn.execute(f"{sql} AND checkpoint_id = ?", (key.thread, key.ns, key.checkpoint)).fetchone()
    return None if found is None else _row(conn, found)


@dataclass(slots=True)
class Listing:
    """A listing that is read page by page, each where the last one ended."""

    scope: rules.Scope
    wanted: dict[str, Any]
    left: int | None
    size: int = _FIRST_PAGE
    last: tuple[str, str, str] | None = None

    def page(self, conn: sqlite3.Connection) -> list[Row]:
        """The next page; an empty one is the end."""
        size = self.size if self.left is None else min(self.size, self.left)
        if size == 0:
            return []
        where, params = self._where()
        found = conn.execute(
            f"SELECT {_COLUMNS} FROM checkpoints {where} "
            "ORDER BY checkpoint_id DESC, thread_id, checkpoint_ns LIMIT ?",
            (*params, size),
        ).fetchall()
        rows = [_row(conn, row) for row in found]
        if rows:
            self.last = rows[-1].key
            self.left = None if self.left is None else self.left - len(rows)
            self.size = min(self.size * 2, _LARGEST_PAGE)
        return rows

    def _where(self) -> tuple[str, list[Any]]:
        clauses: list[str] = []
        params: list[Any] = []
        for column, value in (
            ("thread_id = ?", self.scope.thread),
            ("checkpoint_ns = ?", self.scope.ns),
            ("checkpoint_id = ?", self.scope.checkpoint),
            ("checkpoint_id < ?", self.scope.before),
        ):
            if value is not None:
                clauses.append(column)
                params.append(value)
        if self.wanted:
            clauses.append("persistence_matches(metadata, ?)")
            params.append(json.dumps(self.wanted))
        if self.last is not None:
            thread, ns, id_ = self.last
            clauses.append(
                "checkpoint_id <= ? AND (checkpoint_id < ? OR (thread_id, checkpoint_ns) > (?, ?))"
            )
            params += (id_, id_, thread, ns)
        return ("WHERE " + " AND ".join(clauses) if clauses else "", params)


def delete_threads(conn: sqlite3.Connection, threads: Iterable[str]) -> None:
    """Delete everything of some threads."""
    for thread in threads:
        conn.execute("DELETE FROM checkpoints WHERE thread_id = ?", (thread,))
        conn.execute("DELETE FROM writes WHERE thread_id = ?", (thread,))


def prune(conn: sqlite3.Connection, threads: Iterable[str], codec: Codec) -> None:
    """Keep the latest state of some threads."""
    for thread in threads:
        nodes = _nodes(conn, thread, codec)
        if nodes:
            answers = _answers(conn, thread, prune_needs(nodes), codec)
            _carry_out(conn, thread, prune_plan(thread, nodes, *answers))


def delete_for_runs(conn: sqlite3.Connection, runs: Collection[str], codec: Codec) -> None:
    """Delete the checkpoints of some runs, in all threads."""
    doomed: dict[str, set[Place]] = {}
    found = conn.execute(
        "SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints "
        "WHERE persistence_run(metadata) IN (SELECT value FROM json_each(?))",
        (json.dumps(list(runs)),),
    ).fetchall()
    for thread, ns, id_ in found:
        doomed.setdefault(thread, set()).add((ns, id_))
    for thread, places in doomed.items():
        nodes = _nodes(conn, thread, codec)
        answers = _answers(conn, thread, runs_needs(nodes, places), codec)
        _carry_out(conn, thread, runs_plan(thread, nodes, places, *answers))


def copy_thread(conn: sqlite3.Connection, source: str, target: str) -> None:
    """Copy a thread's rows under another thread id."""
    columns = {
        "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
        "writes": "checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, value",
    }
    if _is_empty(conn, source):
        return
    if not _is_empty(conn, target):
        raise ConflictError(f"thread {target!r} is not empty")
    for table, names in columns.items():
        conn.execute(
            f"INSERT INTO {table} (thread_id, {names}) SELECT ?, {names} FROM {table} WHERE thread_id = ?",
            (target, source),
        )


def _is_empty(conn: sqlite3.Connection, thread: str) -> bool:
    sql = "SELECT 1 FROM checkpoints WHERE thread_id = ? UNION SELECT 1 FROM writes WHERE thread_id = ?"
    return conn.execute(sql, (thread, thread)).fetchone() is None


def ancestors(conn: sqlite3.Connection, key: rules.Key) -> Iterator[Row]:
    """The ancestors of a checkpoint, nearest first; ends at a cycle."""
    row = get(conn, key)
    seen = {row.key[2]} if row else set()
    while row is not None and row.parent and row.parent not in seen:
        seen.add(row.parent)
        row = get(conn, rules.Key(key.thread, key.ns, row.parent))
        if row is not None:
            yield row


def _row(conn: sqlite3.Connection, found: tuple[Any, ...]) -> Row:
    thread, ns, id_, parent, type_, blob, metadata = found
    writes = conn.execute(_WRITES, (thread, ns, id_)).fetchall()
    sends = []
    if parent:
        # Whether the format is that old is known only after decoding; few checkpoints have any.
        sends = conn.execute(f"{_WRITES} AND channel = ?", (thread, ns, parent, TASKS)).fetchall()
    return Row((thread, ns, id_), parent, (type_, blob), metadata, writes, sends)


def _stored(conn: sqlite3.Connection, put: rules.Put, codec: Codec) -> dict[str, Any]:
    """The values stored for the versions of the channels that keep theirs."""
    open_ = set(put.kept)
    stored: dict[str, Any] = {}
    if open_ and put.parent:
        sql = f"SELECT type, checkpoint FROM checkpoints WHERE {_AT}"
        for row in conn.execute(sql, (put.thread, put.ns, put.parent)):
            body, values = codec.open(row)
            for channel in list(open_):
                if _has(body, channel, put):
                    open_.discard(channel)
                    if channel in values:
                        stored[channel] = values[channel]
    if open_:  # not in the parent: hand-made, or the parent is gone
        sql = "SELECT type, checkpoint FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?"
        for row in conn.execute(f"{sql} ORDER BY checkpoint_id DESC", (put.thread, put.ns)):
            body, values = codec.open(row)
            for channel in [c for c in open_ if c in values and _has(body, c, put)]:
                open_.discard(channel)
                stored[channel] = values[channel]
            if not open_:
                break
    return stored


def _has(body: Mapping[str, Any], channel: str, put: rules.Put) -> bool:
    version = (body.get("channel_versions") or {}).get(channel)
    return version is not None and version_text(version, channel) == put.versions[channel]


def _nodes(conn: sqlite3.Connection, thread: str, codec: Codec) -> list[Node]:
    nodes = []
    sql = f"SELECT {_COLUMNS} FROM checkpoints WHERE thread_id = ?"
    for _, ns, id_, parent, type_, blob, text in conn.execute(sql, (thread,)):
        body, _ = codec.open((type_, blob))
        channels = body.get("channel_versions") or {}
        nodes.append(Node.of((ns, id_), parent, body.get("v"), load_metadata(text), channels))
    return nodes


def _answers(
    conn: sqlite3.Connection, thread: str, needs: Needs, codec: Codec
) -> tuple[Collection[Place], Mapping[Place, Collection[str]]]:
    sends = set()
    for ns, id_ in needs.sends:
        sql = f"SELECT 1 FROM writes WHERE {_AT} AND channel = ? LIMIT 1"
        if conn.execute(sql, (thread, ns, id_, TASKS)).fetchone():
            sends.add((ns, id_))
    stored = {}
    for ns in needs.delta:
        sql = "SELECT checkpoint_id, type, checkpoint FROM checkpoints"
        sql += " WHERE thread_id = ? AND checkpoint_ns = ?"
        for id_, type_, blob in conn.execute(sql, (thread, ns)):
            stored[ns, id_] = frozenset(codec.open((type_, blob))[1])
    return sends, stored


def _carry_out(conn: sqlite3.Connection, thread: str, plan: Plan) -> None:
    for ns, ids in plan.delete.items():
        for table in ("checkpoints", "writes"):
            conn.executemany(f"DELETE FROM {table} WHERE {_AT}", [(thread, ns, id_) for id_ in ids])
    for ns, ids in plan.orphans.items():
        conn.executemany(
            f"UPDATE checkpoints SET parent_checkpoint_id = NULL WHERE {_AT}",
            [(thread, ns, id_) for id_ in ids],
        )
    conn.executemany(
        "DELETE FROM writes WHERE thread_id = ? AND checkpoint_ns = ?", [(thread, ns) for ns in plan.calls]
    )
