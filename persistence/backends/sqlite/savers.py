"""The savers on SQLite. Both colours run on one engine, and differ in how a caller waits."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.sqlite import SqliteSaver as OfficialSqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver as OfficialAsyncSqliteSaver

from persistence import rules
from persistence.backends.sqlite import sql
from persistence.backends.sqlite.codec import Codec, codec_for, load_metadata
from persistence.backends.sqlite.connection import SqliteDatabase
from persistence.backends.sqlite.engine import Engine, T, snapshot
from persistence.backends.sqlite.probe import probe
from persistence.backends.sqlite.put import PutWork
from persistence.contract import Probe
from persistence.delta import Ancestor, delta_history
from persistence.metadata import clean_filter
from persistence.metrics import ASYNC_OPERATIONS, OPERATIONS, Meter, measured

_CLOSE_TIMEOUT = 5.0

Work = Callable[[sqlite3.Connection], T]
Sends = list[sql.WriteRow]


@measured(*OPERATIONS, *ASYNC_OPERATIONS)
class _SqliteSaver(BaseCheckpointSaver[str]):
    """All of a saver; the two public classes add LangGraph's own as a base."""

    meter: Meter | None

    def __init__(self, database: SqliteDatabase, *, serde: SerializerProtocol | None = None) -> None:
        BaseCheckpointSaver.__init__(self, serde=serde)
        self._database = database
        self._engine = Engine(database)
        self._latest_codec = self.serde, codec_for(self.serde)

    def probe(self, timeout: float) -> Probe:
        """One look at the database, as the health check needs it."""
        return probe(self._database, self._engine, timeout)

    def figures(self) -> dict[str, float]:
        """How busy the writer is."""
        return self._engine.figures()

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Finish what was accepted; every later call raises ``ClosedError``."""
        self._engine.close(timeout)

    async def aclose(self, timeout: float = _CLOSE_TIMEOUT) -> None:  # noqa: ASYNC109 - also bounds threads
        """As :meth:`close`."""
        await asyncio.to_thread(self._engine.close, timeout)

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint; one with the same id is replaced."""
        config, work = self._put(config, checkpoint, metadata, new_versions)
        self._write(work, atomic=True)  # what it reads beforehand names its version, and stays true
        return config

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """As :meth:`put`."""
        config, work = self._put(config, checkpoint, metadata, new_versions)
        await self._engine.awrite(work)
        return config

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store pending writes of one task."""
        self._write(*self._put_writes(config, writes, task_id, task_path))

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """As :meth:`put_writes`."""
        await self._engine.awrite(self._put_writes(config, writes, task_id, task_path)[0])

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that a config names, or the latest of its namespace."""
        return self._read(self._get(config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As :meth:`get_tuple`."""
        return await self._engine.aread(self._get(config))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, the newest first; read page by page."""
        self._check_sync()
        return self._pages(self._listing(config, filter, before, limit))

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """As :meth:`list`."""
        listing = self._listing(config, filter, before, limit)
        while page := await self._engine.aread(_page(self, listing)):
            for found in _taken(page):
                yield found

    def delete_thread(self, thread_id: str) -> None:
        """Delete everything of one thread."""
        self._write(self._delete_thread(thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        """As :meth:`delete_thread`."""
        await self._engine.awrite(self._delete_thread(thread_id))

    def prune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """Delete all of the threads (``delete``), or all but the latest state (``keep_latest``)."""
        self._write(self._prune(thread_ids, strategy))

    async def aprune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """As :meth:`prune`."""
        await self._engine.awrite(self._prune(thread_ids, strategy))

    def delete_for_runs(self, run_ids: Iterable[str]) -> None:
        """Delete the checkpoints of runs, with their writes."""
        self._write(self._delete_for_runs(run_ids))

    async def adelete_for_runs(self, run_ids: Iterable[str]) -> None:
        """As :meth:`delete_for_runs`."""
        await self._engine.awrite(self._delete_for_runs(run_ids))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy everything of one thread to another, which must be empty."""
        self._write(self._copy_thread(source_thread_id, target_thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """As :meth:`copy_thread`."""
        await self._engine.awrite(self._copy_thread(source_thread_id, target_thread_id))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Per channel, the writes since the nearest stored value on the way to the root."""
        return self._read(self._delta_history(config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """As :meth:`get_delta_channel_history`."""
        return await self._engine.aread(self._delta_history(config, channels))

    # How a caller waits.

    def _check_sync(self) -> None:
        """Whether the calling thread may block; the asynchronous saver says no on its own loop."""
        self._engine.check_open()

    def _write(self, work: Work[T], atomic: bool = False) -> T:
        self._check_sync()
        return self._engine.write(work, atomic=atomic)

    def _read(self, work: Work[T]) -> T:
        self._check_sync()
        return self._engine.read(work)

    def _pages(self, listing: sql.Listing) -> Iterator[CheckpointTuple]:
        while rows := self._read(_rows(listing)):
            for row in _taken(rows):
                yield self._whole(row, self._read)

    # What is done: the arguments are checked and serialised at once, the rest runs on a connection.

    def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> tuple[RunnableConfig, Work[None]]:
        self._engine.check_open()
        put = rules.put_of(config, checkpoint, metadata, new_versions)
        return put.config, PutWork(put, self._codec, self._engine.recent, self.meter)

    def _put_writes(
        self, config: RunnableConfig, writes: Iterable[tuple[str, Any]], task_id: str, task_path: str
    ) -> tuple[Work[None], bool]:
        self._engine.check_open()
        key = rules.key_of(config, exact=True)
        task, path, rows = rules.writes_of(key, writes, task_id, task_path, self.serde)
        if self.meter is not None:
            size = 0
            for row in rows:
                size += len(row.blob)
            self.meter.size("writes", size)
        return lambda conn: sql.put_writes(conn, key, task, path, rows), sql.is_one_statement(rows)

    def _get(self, config: RunnableConfig) -> Work[CheckpointTuple | None]:
        self._engine.check_open()
        key = rules.key_of(config)

        def work(conn: sqlite3.Connection) -> CheckpointTuple | None:
            row = sql.get(conn, key)
            if row is None:
                return None
            checkpoint = self._checkpoint(row)
            if not _has_sends_elsewhere(row, checkpoint):
                return self._tuple(row, checkpoint)
            with snapshot(conn):
                row = sql.get(conn, key)
                return None if row is None else self._whole(row, lambda work: work(conn))

        return work

    def _listing(
        self,
        config: RunnableConfig | None,
        filter: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> sql.Listing:
        self._engine.check_open()
        return sql.Listing(
            rules.scope_of(config, before), clean_filter(filter), left=rules.check_limit(limit)
        )

    def _delete_thread(self, thread_id: str) -> Work[None]:
        thread = rules.text_id(thread_id, "thread_id")
        return self._rewriting(lambda conn: sql.delete_threads(conn, [thread]))

    def _prune(self, thread_ids: Iterable[str], strategy: str) -> Work[None]:
        threads = rules.text_ids(thread_ids, "thread_id")
        rules.check_strategy(strategy)
        if strategy == "delete":
            return self._rewriting(lambda conn: sql.delete_threads(conn, threads))
        codec = self._codec
        return self._rewriting(lambda conn: sql.prune(conn, threads, codec))

    def _delete_for_runs(self, run_ids: Iterable[str]) -> Work[None]:
        runs = rules.text_ids(run_ids, "run_id")
        codec = self._codec
        return self._rewriting(lambda conn: sql.delete_for_runs(conn, runs, codec))

    def _copy_thread(self, source_thread_id: str, target_thread_id: str) -> Work[None]:
        source = rules.text_id(source_thread_id, "source_thread_id")
        target = rules.text_id(target_thread_id, "target_thread_id")
        return self._rewriting(lambda conn: sql.copy_thread(conn, source, target))

    def _rewriting(self, work: Work[None]) -> Work[None]:
        """Work after which the rows may be others than those that were remembered."""

        def run(conn: sqlite3.Connection) -> None:
            self._engine.recent.clear()
            work(conn)

        return run

    def _delta_history(
        self, config: RunnableConfig, channels: Iterable[str]
    ) -> Work[dict[str, DeltaChannelHistory]]:
        self._engine.check_open()
        key, asked = rules.key_of(config), rules.text_ids(channels, "channel")

        def work(conn: sqlite3.Connection) -> dict[str, DeltaChannelHistory]:
            with snapshot(conn):
                return delta_history(asked, map(self._ancestor, sql.ancestors(conn, key)))

        return work

    def _ancestor(self, row: sql.Row) -> Ancestor:
        return Ancestor(
            self._codec.open(row.checkpoint)[1].keys(),
            lambda channel: self.serde.loads_typed(row.checkpoint)["channel_values"][channel],
            lambda: rules.pending_writes(row.writes, self.serde),
        )

    def _whole(self, row: sql.Row, read: Callable[[Work[Sends]], Sends]) -> CheckpointTuple:
        checkpoint = self._checkpoint(row)
        if _has_sends_elsewhere(row, checkpoint):
            sends = rules.pending_writes(read(lambda conn: sql.sends(conn, row)), self.serde)
            rules.add_sends(checkpoint, [value for _, _, value in sends])
        return self._tuple(row, checkpoint)

    def _checkpoint(self, row: sql.Row) -> dict[str, Any]:
        if self.meter is not None:
            size = len(row.checkpoint[1])
            for write in row.writes:
                size += len(write[5])
            self.meter.size("loaded", size)
        loaded = self.serde.loads_typed(row.checkpoint)
        return loaded if type(loaded) is dict else dict(loaded)

    def _tuple(self, row: sql.Row, checkpoint: dict[str, Any]) -> CheckpointTuple:
        return rules.checkpoint_tuple(
            row.key,
            row.parent,
            checkpoint,
            load_metadata(row.metadata),
            rules.pending_writes(row.writes, self.serde),
        )

    @property
    def _codec(self) -> Codec:
        if self._latest_codec[0] is not self.serde:  # LangGraph gives a copy of a saver another serializer
            self._latest_codec = self.serde, codec_for(self.serde)
        return self._latest_codec[1]

    def _create_tables(self) -> None:
        self._engine.check_open()
        with closing(self._database.connect()) as conn:
            OfficialSqliteSaver(conn).setup()


def _rows(listing: sql.Listing) -> Work[list[sql.Row]]:
    def work(conn: sqlite3.Connection) -> list[sql.Row]:
        with snapshot(conn):
            return listing.page(conn)

    return work


def _page(saver: _SqliteSaver, listing: sql.Listing) -> Work[list[CheckpointTuple]]:
    def work(conn: sqlite3.Connection) -> list[CheckpointTuple]:
        with snapshot(conn):
            rows = listing.page(conn)
            return [saver._whole(row, lambda work: work(conn)) for row in _taken(rows)]

    return work


def _taken(page: list[T]) -> Iterator[T]:
    """The items of a page, each let go as soon as the next is asked for: the next page takes their place."""
    page.reverse()
    while page:
        yield page.pop()


def _has_sends_elsewhere(row: sql.Row, checkpoint: dict[str, Any]) -> bool:
    return bool(row.parent) and rules.has_sends_in_parent(checkpoint)


class SqliteSaver(_SqliteSaver, OfficialSqliteSaver):
    """The synchronous saver; its ``a*`` methods work on any event loop."""

    def setup(self) -> None:
        """Make LangGraph's tables, as the official saver does; ``persistence setup`` does more."""
        self._create_tables()


class AsyncSqliteSaver(_SqliteSaver, OfficialAsyncSqliteSaver):
    """The asynchronous saver; its synchronous methods work from other threads."""

    def __init__(self, database: SqliteDatabase, *, serde: SerializerProtocol | None = None) -> None:
        """To be made on the event loop that it belongs to."""
        super().__init__(database, serde=serde)
        self.loop = asyncio.get_running_loop()

    async def setup(self) -> None:
        """As :meth:`SqliteSaver.setup`."""
        await asyncio.to_thread(self._create_tables)

    def _check_sync(self) -> None:
        super()._check_sync()
        rules.check_loop(self.loop, "AsyncSqliteSaver")
