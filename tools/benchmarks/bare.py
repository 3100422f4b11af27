"""The limit: the same rows written and read by the bare driver, with the same durability.

Rows are serialised beforehand, and read back as bytes. So what is left is the database and its driver:
one statement for the rows of an operation on Postgres, one transaction on SQLite.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection, Connection
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from persistence.backends.postgres.batches import Batches
from persistence.backends.postgres.connection import AsyncPool
from tools.benchmarks.clients import WrongStateError
from tools.benchmarks.material import Rows, Workflow, rows

PUT = """
WITH blobs AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT %(thread)s, '', b.* FROM unnest(
        %(channels)s::text[], %(versions)s::text[], %(types)s::text[], %(blobs)b::bytea[]
    ) AS b
    ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING
)
INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
VALUES (%(thread)s, '', %(id)s, %(parent)s, %(body)s::jsonb, %(metadata)s::jsonb)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id) DO UPDATE SET
    checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata
"""
PUT_WRITES = """
INSERT INTO checkpoint_writes
    (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob)
SELECT %(thread)s, '', %(id)s, %(task)s, '', w.* FROM unnest(
    %(idxs)s::int[], %(channels)s::text[], %(types)s::text[], %(blobs)b::bytea[]
) AS w
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO NOTHING
"""
HISTORY = """
SELECT c.checkpoint_id, c.checkpoint::text, c.metadata::text,
    ARRAY(
        SELECT b.blob FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
        CROSS JOIN LATERAL (
            SELECT b.blob FROM checkpoint_blobs AS b
            WHERE b.thread_id = %(thread)s AND b.checkpoint_ns = '' AND b.channel = v.key
                AND b.version = v.value OFFSET 0
        ) AS b
    ),
    ARRAY(
        SELECT w.blob FROM checkpoint_writes AS w
        WHERE w.thread_id = %(thread)s AND w.checkpoint_ns = '' AND w.checkpoint_id = c.checkpoint_id
    )
FROM checkpoints AS c WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = ''
ORDER BY c.checkpoint_id DESC
"""
GET = HISTORY + "LIMIT 1"

TABLES = """
CREATE TABLE IF NOT EXISTS checkpoints (
    thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '', checkpoint_id TEXT NOT NULL,
    parent_checkpoint_id TEXT, type TEXT, checkpoint BLOB, metadata BLOB,
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id)
);
CREATE TABLE IF NOT EXISTS writes (
    thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '', checkpoint_id TEXT NOT NULL,
    task_id TEXT NOT NULL, task_path TEXT NOT NULL DEFAULT '', idx INTEGER NOT NULL, channel TEXT NOT NULL,
    type TEXT, value BLOB,
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, idx)
);
"""
"""As the official SQLite saver makes them."""

Found = tuple[Any, ...]


class _Prepared:
    """The rows of each workflow, serialised when it is first met."""

    def __init__(self) -> None:
        self._rows: dict[str, Rows] = {}
        self._shared: dict[int, Rows] = {}

    def prepare(self, workflow: Workflow) -> Rows:
        """The rows; workflows of one size share their bytes."""
        if (found := self._rows.get(workflow.thread)) is None:
            found = self._shared.setdefault(workflow.size, rows(workflow))
            self._rows[workflow.thread] = found
        return found


class _Postgres(_Prepared):
    """Parameters and checks of both colours."""

    def _put(self, workflow: Workflow, step: int) -> dict[str, Any]:
        workflow.advance(step)
        ready = self.prepare(workflow)
        versions = workflow.versions(step)
        changed = [name for name in workflow.new_versions(step) if name in ready.blobs]
        body = {**ready.body, "id": workflow.id, "channel_versions": versions}
        return {
            "thread": workflow.thread,
            "id": workflow.id,
            "parent": workflow.parent,
            "body": Jsonb(body),
            "metadata": ready.metadata,
            "channels": changed,
            "versions": [str(versions[name]) for name in changed],
            "types": [ready.blobs[name][0] for name in changed],
            "blobs": [ready.blobs[name][1] for name in changed],
        }

    def _put_writes(self, workflow: Workflow) -> dict[str, Any]:
        ready = self.prepare(workflow)
        idxs, channels, types, blobs = (list(column) for column in zip(*ready.writes, strict=True))
        return {
            "thread": workflow.thread,
            "id": workflow.id,
            "task": str(uuid.uuid4()),
            "idxs": idxs,
            "channels": channels,
            "types": types,
            "blobs": blobs,
        }

    def _glance(self, found: Found | None, workflow: Workflow) -> None:
        if found is None or found[0] != workflow.id or len(found[4]) != 2:
            raise WrongStateError("the latest rows are missing")

    def _compare(self, found: Found | None, workflow: Workflow, step: int) -> None:
        self._glance(found, workflow)
        assert found is not None  # noqa: S101 - _glance() has seen to it
        ready = self.prepare(workflow)
        blobs = sorted(blob for _, blob in ready.blobs.values())
        writes = sorted(blob for *_, blob in ready.writes)
        body = json.loads(found[1])
        if sorted(found[3]) != blobs or sorted(found[4]) != writes:
            raise WrongStateError("bytes differ")
        if body["channel_versions"] != workflow.versions(step):
            raise WrongStateError("versions differ")


class Postgres(_Postgres):
    """psycopg and its pool, nothing else."""

    def __init__(self, pool: ConnectionPool[Connection[Found]]) -> None:
        super().__init__()
        self._pool = pool

    def put(self, workflow: Workflow, step: int) -> None:
        """One statement."""
        self._run(PUT, self._put(workflow, step))

    def put_writes(self, workflow: Workflow, step: int) -> None:
        """One statement."""
        self._run(PUT_WRITES, self._put_writes(workflow))

    def get(self, workflow: Workflow, step: int) -> None:
        """One statement."""
        self._glance(self._latest(workflow), workflow)

    def check(self, workflow: Workflow, step: int) -> None:
        """Compare the bytes."""
        self._compare(self._latest(workflow), workflow, step)

    def history(self, workflow: Workflow) -> int:
        """All rows in one answer."""
        with self._pool.connection() as conn, conn.cursor(binary=True) as cursor:
            return len(cursor.execute(HISTORY, {"thread": workflow.thread}).fetchall())

    def _run(self, statement: str, parameters: dict[str, Any]) -> None:
        with self._pool.connection() as conn, conn.cursor(binary=True) as cursor:
            cursor.execute(statement, parameters)

    def _latest(self, workflow: Workflow) -> Found | None:
        with self._pool.connection() as conn, conn.cursor(binary=True) as cursor:
            return cursor.execute(GET, {"thread": workflow.thread}).fetchone()


class AsyncPostgres(_Postgres):
    """As :class:`Postgres`, for an event loop."""

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[Found]]) -> None:
        super().__init__()
        self._pool = pool

    async def put(self, workflow: Workflow, step: int) -> None:
        """One statement."""
        await self._run(PUT, self._put(workflow, step))

    async def put_writes(self, workflow: Workflow, step: int) -> None:
        """One statement."""
        await self._run(PUT_WRITES, self._put_writes(workflow))

    async def get(self, workflow: Workflow, step: int) -> None:
        """One statement."""
        self._glance(await self._latest(workflow), workflow)

    async def check(self, workflow: Workflow, step: int) -> None:
        """Compare the bytes."""
        self._compare(await self._latest(workflow), workflow, step)

    async def history(self, workflow: Workflow) -> int:
        """All rows in one answer."""
        async with self._pool.connection() as conn, conn.cursor(binary=True) as cursor:
            await cursor.execute(HISTORY, {"thread": workflow.thread})
            return len(await cursor.fetchall())

    async def _run(self, statement: str, parameters: dict[str, Any]) -> None:
        async with self._pool.connection() as conn, conn.cursor(binary=True) as cursor:
            await cursor.execute(statement, parameters)

    async def _latest(self, workflow: Workflow) -> Found | None:
        async with self._pool.connection() as conn, conn.cursor(binary=True) as cursor:
            await cursor.execute(GET, {"thread": workflow.thread})
            return await cursor.fetchone()


class SharedPostgres(AsyncPostgres):
    """As :class:`AsyncPostgres`, by the round trips that our saver's operations share: the limit of those."""

    def __init__(self, pool: AsyncPool) -> None:
        _Prepared.__init__(self)
        self._batches = Batches(pool)

    async def _run(self, statement: str, parameters: dict[str, Any]) -> None:
        if "body" in parameters:
            parameters["body"] = json.dumps(parameters["body"].obj)
        await self._batches.write((statement, parameters))

    async def _latest(self, workflow: Workflow) -> Found | None:
        rows = await self._batches.read((GET, {"thread": workflow.thread}))
        return rows[0] if rows else None


class Sqlite(_Prepared):
    """``sqlite3`` in WAL mode, ``synchronous=FULL``: each operation is one transaction.

    Many workflows at once are served as by an ideal group commit: ``*_many`` is one transaction for all.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._conn.execute("PRAGMA journal_mode = WAL")
        self._conn.execute("PRAGMA synchronous = FULL")
        self._conn.executescript(TABLES)

    def close(self) -> None:
        """Let go of the file."""
        self._conn.close()

    def put(self, workflow: Workflow, step: int) -> None:
        """One transaction."""
        self.put_many([workflow], step)

    def put_many(self, workflows: list[Workflow], step: int) -> None:
        """One transaction for all."""
        self._conn.execute("BEGIN IMMEDIATE")
        for workflow in workflows:
            workflow.advance(step)
            ready = self.prepare(workflow)
            self._conn.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, '', ?, ?, ?, ?, ?)",
                (workflow.thread, workflow.id, workflow.parent, *ready.document, ready.metadata.encode()),
            )
        self._conn.execute("COMMIT")

    def put_writes(self, workflow: Workflow, step: int) -> None:
        """One transaction."""
        self.put_writes_many([workflow])

    def put_writes_many(self, workflows: list[Workflow]) -> None:
        """One transaction for all."""
        self._conn.execute("BEGIN IMMEDIATE")
        for workflow in workflows:
            key = (workflow.thread, workflow.id, str(uuid.uuid4()))
            self._conn.executemany(
                "INSERT OR IGNORE INTO writes VALUES (?, '', ?, ?, '', ?, ?, ?, ?)",
                [(*key, *row) for row in self.prepare(workflow).writes],
            )
        self._conn.execute("COMMIT")

    def get(self, workflow: Workflow, step: int) -> None:
        """Two statements."""
        self._latest(workflow)

    def get_many(self, workflows: list[Workflow]) -> None:
        """One after the other."""
        for workflow in workflows:
            self._latest(workflow)

    def check(self, workflow: Workflow, step: int) -> None:
        """Compare the bytes."""
        document, writes = self._latest(workflow)
        ready = self.prepare(workflow)
        if document != ready.document[1] or writes != [(row[3],) for row in ready.writes]:
            raise WrongStateError("bytes differ")

    def history(self, workflow: Workflow) -> int:
        """Two statements."""
        found = self._conn.execute(
            "SELECT * FROM checkpoints WHERE thread_id = ? ORDER BY checkpoint_id DESC", (workflow.thread,)
        ).fetchall()
        self._conn.execute("SELECT * FROM writes WHERE thread_id = ?", (workflow.thread,)).fetchall()
        return len(found)

    def _latest(self, workflow: Workflow) -> tuple[bytes, list[tuple[bytes]]]:
        found = self._conn.execute(
            "SELECT checkpoint_id, type, checkpoint, metadata FROM checkpoints "
            "WHERE thread_id = ? AND checkpoint_ns = '' ORDER BY checkpoint_id DESC LIMIT 1",
            (workflow.thread,),
        ).fetchone()
        if found is None or found[0] != workflow.id:
            raise WrongStateError("the latest rows are missing")
        writes = self._conn.execute(
            "SELECT value FROM writes WHERE thread_id = ? AND checkpoint_ns = '' AND checkpoint_id = ? "
            "ORDER BY task_id, idx",
            (workflow.thread, workflow.id),
        ).fetchall()
        return found[2], writes
