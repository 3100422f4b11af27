"""What the SQLite savers do on a connection: the statements, in the official saver's tables."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgspec
from langgraph.checkpoint.serde.types import TASKS

from persistence import rules
from persistence.backends.sqlite.codec import LARGE_ROW, Codec, Sealed, load_metadata
from persistence.errors import ConflictError
from persistence.lineage import Needs, Node, Place, Plan, prune_needs, prune_plan, runs_needs, runs_plan
from persistence.rules import Typed, version_text

_COLUMNS = "thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata"
_AT = "thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
_PUT = f"INSERT OR REPLACE INTO checkpoints ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
# Only blobs of zeros at the end of a row take no memory; their bytes are written afterwards.
_PUT_EMPTY = _PUT.replace("?, ?)", "zeroblob(?), zeroblob(?))")
_PUT_WRITES = """
    INSERT INTO writes
        (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, value)
    VALUES {}
    ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO """
_WRITE_VALUES = "(?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REPLACE_WRITE = (
    _PUT_WRITES.format(_WRITE_VALUES)
    + """UPDATE SET task_path = excluded.task_path, channel = excluded.channel,
        type = excluded.type, value = excluded.value"""
)
# So many rows go into one statement; each step of one gives the interpreter lock away.
_WRITES_AT_ONCE = 8
_KEEP_WRITES = [
    f"{_PUT_WRITES.format(', '.join([_WRITE_VALUES] * n))}NOTHING" for n in range(_WRITES_AT_ONCE + 1)
]
_WRITES = f"SELECT task_path, task_id, idx, channel, type, value FROM writes WHERE {_AT}"
_LATEST = """(SELECT checkpoint_id FROM checkpoints WHERE thread_id = ?1 AND checkpoint_ns = ?2
    ORDER BY checkpoint_id DESC LIMIT 1)"""
# A join would repeat the checkpoint for each of its writes. Of both kinds of row only a write has an index.
# The metadata lies behind the checkpoint: asked for first, SQLite would walk through all pages of that twice.
_GET = """
    SELECT checkpoint_id, parent_checkpoint_id, NULL, type, checkpoint, metadata FROM checkpoints
    WHERE thread_id = ?1 AND checkpoint_ns = ?2 AND checkpoint_id = {0}
    UNION ALL
    SELECT task_path, task_id, idx, channel, type, value FROM writes
    WHERE thread_id = ?1 AND checkpoint_ns = ?2 AND checkpoint_id = {0}"""
_GET_EXACT = _GET.format("?3")
_GET_LATEST = _GET.format(_LATEST)
# The keys as a JSON array lead, so rows come in their order.
_OF_KEYS = """
    FROM json_each(?) k CROSS JOIN {0} c
    ON c.thread_id = json_extract(k.value, '$[0]')
        AND c.checkpoint_ns = json_extract(k.value, '$[1]')
        AND c.checkpoint_id = json_extract(k.value, '$[2]')
"""
_PAGE = f"""
    SELECT k.key, parent_checkpoint_id, c.type, checkpoint, metadata
    {_OF_KEYS.format("checkpoints")}"""
_PAGE_WRITES = f"SELECT k.key, task_path, task_id, idx, channel, c.type, c.value {_OF_KEYS.format('writes')}"
_RANGE_WRITES = """
    SELECT checkpoint_id, task_path, task_id, idx, channel, type, value FROM writes
    WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id BETWEEN ? AND ?"""
_PLAIN_TEXT = re.compile(r"[\w.:-]*", re.ASCII)
_PLAIN_NAME = re.compile(r"[\w.:-]*[A-Za-z][\w.:-]*", re.ASCII)  # with a letter: not the text of a number
_FEW_RUNS = 16
_FEW_BYTES = 1 << 13  # are copied in less time than it takes to look for an adapter
_PAGE_ROWS = 16
_RANGE_ROWS = 64
_PAGE_BYTES = 1 << 18
_FIRST_KEYS, _MOST_KEYS = 256, 4096

Where = tuple[str, str, str]
WriteRow = tuple[str, str, int, str, str, bytes]


@dataclass(slots=True)
class Row:
    """A checkpoint as stored, with its writes."""

    key: Where
    parent: str | None
    checkpoint: Typed
    metadata: bytes | str | None
    writes: list[WriteRow]


def put(conn: sqlite3.Connection, put: rules.Put, sealed: Sealed) -> None:
    """Store a checkpoint, by one statement or in the transaction that is open."""
    if sealed.size <= LARGE_ROW:
        (whole,) = sealed.parts
        conn.execute(
            _PUT,
            (
                put.thread,
                put.ns,
                put.id,
                put.parent,
                sealed.type,
                _param(whole),
                _param(put.metadata.encode()),
            ),
        )
        return
    key = (put.thread, put.ns, put.id, put.parent, sealed.type)
    metadata = put.metadata.encode()
    # By one statement SQLite would copy the bytes twice.
    is_alone = not conn.in_transaction
    if is_alone:
        conn.execute("BEGIN IMMEDIATE")
    row = conn.execute(_PUT_EMPTY, (*key, sealed.size, len(metadata))).lastrowid or 0
    for column, parts in (("checkpoint", sealed.parts), ("metadata", [metadata])):
        with conn.blobopen("checkpoints", column, row) as blob:
            for part in parts:
                blob.write(part)
    if is_alone:
        conn.execute("COMMIT")


def _param(blob: bytes) -> bytes | bytearray:
    """Bytes as a parameter: the sqlite3 module looks for an adapter of bytes, and for none of a bytearray."""
    return bytearray(blob) if len(blob) <= _FEW_BYTES else blob


def stored(conn: sqlite3.Connection, put: rules.Put, codec: Codec) -> dict[str, Any]:
    """The values stored for the versions of the channels that keep theirs."""
    open_ = set(put.kept)
    found: dict[str, Any] = {}
    if open_ and put.parent:
        sql = f"SELECT type, checkpoint FROM checkpoints WHERE {_AT}"
        for row in conn.execute(sql, (put.thread, put.ns, put.parent)):
            body, values = codec.open(row)
            for channel in list(open_):
                if _has(body, channel, put):
                    open_.discard(channel)
                    if channel in values:
                        found[channel] = values[channel]
    if open_:  # not in the parent: hand-made, or the parent is gone
        sql = "SELECT type, checkpoint FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?"
        for row in conn.execute(f"{sql} ORDER BY checkpoint_id DESC", (put.thread, put.ns)):
            body, values = codec.open(row)
            for channel in [c for c in open_ if c in values and _has(body, c, put)]:
                open_.discard(channel)
                found[channel] = values[channel]
            if not open_:
                break
    return found


def put_writes(
    conn: sqlite3.Connection, key: rules.Key, task: str, path: str, writes: Iterable[rules.Write]
) -> None:
    """Store writes, each by its own rule: first wins, or last wins for the special ones."""
    kept: list[tuple[Any, ...]] = []
    for w in writes:
        row = (key.thread, key.ns, key.checkpoint, task, path, w.idx, w.channel, w.type, _param(w.blob))
        if w.idx < 0:
            conn.execute(_REPLACE_WRITE, row)
        else:
            kept.append(row)
    for start in range(0, len(kept), _WRITES_AT_ONCE):
        rows = kept[start : start + _WRITES_AT_ONCE]
        conn.execute(_KEEP_WRITES[len(rows)], [*chain(*rows)])


def is_one_statement(writes: Sequence[rules.Write]) -> bool:
    """Whether :func:`put_writes` needs only one for these."""
    if len(writes) > _WRITES_AT_ONCE:
        return False
    for write in writes:
        if write.idx < 0:
            return len(writes) == 1
    return True


def get(conn: sqlite3.Connection, key: rules.Key) -> Row | None:
    """The row of a checkpoint, or of the latest, by one statement."""
    if key.checkpoint is None:
        found = conn.execute(_GET_LATEST, (key.thread, key.ns)).fetchall()
    else:
        found = conn.execute(_GET_EXACT, (key.thread, key.ns, key.checkpoint)).fetchall()
    for position, line in enumerate(found):
        if line[2] is None:
            del found[position]  # what is left are its writes
            id_, parent, _, type_, blob, metadata = line
            return Row((key.thread, key.ns, id_), parent, (type_, blob), metadata, found)
    return None


def sends(conn: sqlite3.Connection, row: Row) -> list[WriteRow]:
    """What the parent's tasks sent: old formats keep it there."""
    thread, ns, _ = row.key
    return conn.execute(f"{_WRITES} AND channel = ?", (thread, ns, row.parent, TASKS)).fetchall()


@dataclass(slots=True)
class Listing:
    """A listing that is read page by page. A page holds some rows or some bytes, whatever is less.

    Of one namespace the rows lie in their order. Else keys are read ahead, each time from where the last
    one ended, because finding them may mean a look at every key there is.
    """

    scope: rules.Scope
    wanted: dict[str, Any]
    left: int | None
    ahead: int = _FIRST_KEYS
    last: Where | None = None
    keys: list[Where] = field(default_factory=list)

    def page(self, conn: sqlite3.Connection) -> list[Row]:
        """The next page; an empty one is the end."""
        if self.scope.thread is not None and self.scope.ns is not None and not self.wanted:
            return self._range(conn, self.scope.thread, self.scope.ns)
        while True:
            if not self.keys:
                self._read_keys(conn)
            if not self.keys:
                return []
            rows = self._rows(conn, self.keys[:_PAGE_ROWS])
            if rows:  # else all were deleted meanwhile
                return rows

    def _range(self, conn: sqlite3.Connection, thread: str, ns: str) -> list[Row]:
        count = _RANGE_ROWS if self.left is None else min(_RANGE_ROWS, self.left)
        where, params = self._where()
        sql = f"""SELECT checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata FROM checkpoints
            {where} ORDER BY checkpoint_id DESC LIMIT ?"""
        rows: dict[str, Row] = {}
        size = 0
        with closing(conn.execute(sql, (*params, count))) as cursor:
            for id_, parent, type_, blob, metadata in cursor:
                rows[id_] = Row((thread, ns, id_), parent, (type_, blob), metadata, [])
                size += len(blob)
                if size > _PAGE_BYTES:
                    break
        if rows:
            self.last = (thread, ns, id_)
            self.left = None if self.left is None else self.left - len(rows)
            for found in conn.execute(_RANGE_WRITES, (thread, ns, id_, next(iter(rows)))):
                if row := rows.get(found[0]):
                    row.writes.append(found[1:])
        return list(rows.values())

    def _read_keys(self, conn: sqlite3.Connection) -> None:
        count, self.ahead = self.ahead, min(self.ahead * 4, _MOST_KEYS)
        if self.left is not None:
            count = min(count, self.left)
        if count == 0:
            return
        where, params = self._where()
        self.keys = conn.execute(
            f"SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints {where} "
            "ORDER BY checkpoint_id DESC, thread_id, checkpoint_ns LIMIT ?",
            (*params, count),
        ).fetchall()
        if self.keys:
            self.last = self.keys[-1]
            self.left = None if self.left is None else self.left - len(self.keys)

    def _rows(self, conn: sqlite3.Connection, keys: list[Where]) -> list[Row]:
        sql, params = _PAGE, [_json(keys)]
        if self.wanted:  # metadata may have been replaced since the key was read
            sql += " WHERE persistence_matches(metadata, ?)"
            params.append(json.dumps(self.wanted))
        rows: dict[int, Row] = {}
        done, size = len(keys), 0
        with closing(conn.execute(sql, params)) as cursor:
            for position, parent, type_, blob, metadata in cursor:
                rows[position] = Row(keys[position], parent, (type_, blob), metadata, [])
                size += len(blob)
                if size > _PAGE_BYTES:
                    done = position + 1
                    break
        del self.keys[:done]
        for found in conn.execute(_PAGE_WRITES, [_json(keys[:done])]):
            if row := rows.get(found[0]):
                row.writes.append(found[1:])
        return list(rows.values())

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
            for value in self.wanted.values():
                if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value):
                    # JSON can write it in one way only. SQLite looks for bytes; the rest is for Python.
                    clauses.append("instr(metadata, ?)")
                    params.append(f'"{value}"'.encode())
            clauses.append("persistence_matches(metadata, ?)")
            params.append(json.dumps(self.wanted))
        if self.last is not None:
            thread, ns, id_ = self.last
            clauses.append(
                "checkpoint_id <= ? AND (checkpoint_id < ? OR (thread_id, checkpoint_ns) > (?, ?))"
            )
            params += (id_, id_, thread, ns)
        return ("WHERE " + " AND ".join(clauses) if clauses else "", params)


def _json(keys: list[Where]) -> str:
    return msgspec.json.encode(keys).decode()


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
    sql = "SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints WHERE "
    params: list[Any] = []
    if len(runs) <= _FEW_RUNS and all(_PLAIN_NAME.fullmatch(run) for run in runs):
        # As in Listing._where: SQLite is faster at looking for bytes.
        sql += f"({' OR '.join(['instr(metadata, ?)'] * len(runs)) or 'false'}) AND "
        params += [run.encode() for run in runs]
    sql += "persistence_run(metadata) IN (SELECT value FROM json_each(?))"
    found = conn.execute(sql, (*params, json.dumps(list(runs)))).fetchall()
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
    sending = set()
    for ns, id_ in needs.sends:
        sql = f"SELECT 1 FROM writes WHERE {_AT} AND channel = ? LIMIT 1"
        if conn.execute(sql, (thread, ns, id_, TASKS)).fetchone():
            sending.add((ns, id_))
    stored = {}
    for ns in needs.delta:
        sql = "SELECT checkpoint_id, type, checkpoint FROM checkpoints"
        sql += " WHERE thread_id = ? AND checkpoint_ns = ?"
        for id_, type_, blob in conn.execute(sql, (thread, ns)):
            stored[ns, id_] = frozenset(codec.open((type_, blob))[1])
    return sending, stored


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
