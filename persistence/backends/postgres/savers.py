"""The savers on Postgres: what is done is in ``steps``, how it is run in each colour is here."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
)
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.postgres import PostgresSaver as OfficialPostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver as OfficialAsyncPostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg import errors

from persistence import rules
from persistence.backends.postgres import steps
from persistence.backends.postgres.arguments import Life, PostgresArguments, Statement
from persistence.backends.postgres.batches import Batches
from persistence.backends.postgres.conflicts import CONFLICTS, again, again_async
from persistence.backends.postgres.connection import AsyncPool, Pool, translated
from persistence.backends.postgres.home import Home
from persistence.backends.postgres.steps import Listing, Rows, Steps
from persistence.backends.postgres.threads import ThreadBatches
from persistence.metrics import ASYNC_OPERATIONS, OPERATIONS, measured

T = TypeVar("T")

_EXPECTED = errors.InvalidTextRepresentation
"""An operation may expect it of a statement, which then was not carried out."""
_KEY = itemgetter("thread", "ns", "id")
"""Of the row that ``put`` stores. No transaction may store one twice, since it is known by its ``xmin``."""
_CONFLICTS = (*CONFLICTS, errors.UniqueViolation)
"""A copy meets the last one where somebody else fills the target meanwhile."""


@measured(
    *OPERATIONS, "aput", "aput_writes", "alist", "aprune", "adelete_for_runs", "aget_delta_channel_history"
)
class PostgresSaver(PostgresArguments, OfficialPostgresSaver):
    """The synchronous saver; its ``a*`` methods run in worker threads."""

    def __init__(self, pool: Pool, *, serde: SerializerProtocol | None = None) -> None:
        BaseCheckpointSaver.__init__(self, serde=serde)
        self.pool = pool
        self._where = pool.name
        self._life = Life()
        self._batches = ThreadBatches(pool)

    def setup(self) -> None:
        """Make LangGraph's tables, as the official saver does; ``persistence setup`` does more."""
        self._check_open()
        with translated(self._where), self.pool.connection() as conn:
            OfficialPostgresSaver(conn).setup()

    def close(self) -> None:
        """Every later call raises ``ClosedError``; the pool belongs to who made it."""
        self._life.closed = True

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint; one with the same id is replaced."""
        config, operation = self._put(config, checkpoint, metadata, new_versions)
        self._run(operation, self._store)
        return config

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store pending writes of one task."""
        if statement := self._put_writes(config, writes, task_id, task_path):
            self._ask(self._batches.write, statement)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that a config names, or the latest of its namespace."""
        return self._tuple(self._ask(self._batches.read, self._get(config)))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, the newest first; read page by page."""
        return self._pages(self._listing(config, filter, before, limit))

    def delete_thread(self, thread_id: str) -> None:
        """Delete everything of one thread."""
        self._transact(self._delete_thread(thread_id))

    def prune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """Delete all of the threads (``delete``), or all but the latest state (``keep_latest``)."""
        self._transact(self._prune(thread_ids, strategy))

    def delete_for_runs(self, run_ids: Iterable[str]) -> None:
        """Delete the checkpoints of runs, with their writes."""
        self._transact(self._delete_for_runs(run_ids))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy everything of one thread to another, which must be empty."""
        self._transact(self._copy_thread(source_thread_id, target_thread_id))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Per channel, the writes since the nearest stored value on the way to the root."""
        return self._run(self._history(config, channels), self._execute)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """As :meth:`put`."""
        config, operation = self._put(config, checkpoint, metadata, new_versions)
        await asyncio.to_thread(self._run, operation, self._store)
        return config

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """As :meth:`put_writes`."""
        if statement := self._put_writes(config, writes, task_id, task_path):
            await asyncio.to_thread(self._ask, self._batches.write, statement)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As :meth:`get_tuple`."""
        return await asyncio.to_thread(self.get_tuple, config)

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
        while rows := await asyncio.to_thread(self._page, listing):
            for row in rows:
                yield steps.load(row, self.serde)

    async def adelete_thread(self, thread_id: str) -> None:
        """As :meth:`delete_thread`."""
        await asyncio.to_thread(self.delete_thread, thread_id)

    async def aprune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """As :meth:`prune`."""
        await asyncio.to_thread(self._transact, self._prune(thread_ids, strategy))

    async def adelete_for_runs(self, run_ids: Iterable[str]) -> None:
        """As :meth:`delete_for_runs`."""
        await asyncio.to_thread(self._transact, self._delete_for_runs(run_ids))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """As :meth:`copy_thread`."""
        await asyncio.to_thread(self.copy_thread, source_thread_id, target_thread_id)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """As :meth:`get_delta_channel_history`."""
        return await asyncio.to_thread(self._run, self._history(config, channels), self._execute)

    def _ask(self, run: Callable[..., Rows], statement: Statement, *key: Hashable) -> Rows:
        self._check_open()
        with translated(self._where):
            return run(statement, *key)

    def _execute(self, statement: Statement) -> Rows:
        return self._ask(self._batches.alone, statement)

    def _store(self, statement: Statement) -> Rows:
        return self._ask(self._batches.write, statement, _KEY(statement[1]))

    def _run(self, operation: Steps[T], execute: Callable[[Statement], Rows]) -> T:
        """Run an operation; between its statements no connection is held."""
        proceed: Callable[[], Statement] = operation.__next__
        try:
            while True:
                statement = proceed()
                try:
                    proceed = partial(operation.send, execute(statement))
                except _EXPECTED as error:
                    proceed = partial(operation.throw, error)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _transact(self, begin: Callable[[], Steps[None]]) -> None:
        """Run an operation in one transaction, again where another one came in between."""

        def work() -> None:
            with self.pool.connection() as conn, conn.transaction():
                operation, rows = begin(), None
                while (statement := _next(operation, rows)) is not None:
                    rows = conn.wait(conn.wire.run(*statement, prepare=False))

        with translated(self._where):
            again(work, _CONFLICTS)

    def _page(self, listing: Listing) -> Rows:
        return self._run(listing.page(), self._execute)

    def _pages(self, listing: Listing) -> Iterator[CheckpointTuple]:
        while rows := self._page(listing):
            for row in rows:
                yield steps.load(row, self.serde)


@measured(*OPERATIONS, *ASYNC_OPERATIONS)
class AsyncPostgresSaver(PostgresArguments, OfficialAsyncPostgresSaver):
    """The asynchronous saver; its synchronous methods work from other threads.

    Called from another event loop, it works on its own one while that one runs.
    """

    def __init__(self, pool: AsyncPool, *, serde: SerializerProtocol | None = None) -> None:
        """To be made on the event loop that the pool belongs to."""
        BaseCheckpointSaver.__init__(self, serde=serde)
        self.pool = pool
        self._home = Home(type(self).__name__)
        self.loop = self._home.loop
        self._where = pool.name
        self._life = Life()
        self._batches = Batches(pool)

    async def setup(self) -> None:
        """As :meth:`PostgresSaver.setup`."""
        self._check_open()
        with translated(self._where):
            async with self.pool.connection() as conn:
                await OfficialAsyncPostgresSaver(conn).setup()

    async def aclose(self) -> None:
        """Every later call raises ``ClosedError``; the pool belongs to who made it."""
        self._life.closed = True

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint; one with the same id is replaced."""
        config, operation = self._put(config, checkpoint, metadata, new_versions)
        await self._home.here(self._run(operation, self._store))
        return config

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Store pending writes of one task."""
        if statement := self._put_writes(config, writes, task_id, task_path):
            await self._home.here(self._ask(self._batches.write, statement))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that a config names, or the latest of its namespace."""
        statement = self._get(config)
        rows = await self._home.here(self._ask(self._batches.read, statement))
        if rows and steps.is_large(rows[0]):
            return await asyncio.to_thread(self._tuple, rows)
        return self._tuple(rows)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """Checkpoints, the newest first; read page by page."""
        listing = self._listing(config, filter, before, limit)
        while rows := await self._home.here(self._run(listing.page(), self._execute)):
            for row in rows:
                if steps.is_large(row):
                    yield await asyncio.to_thread(steps.load, row, self.serde)
                else:
                    yield steps.load(row, self.serde)

    async def adelete_thread(self, thread_id: str) -> None:
        """Delete everything of one thread."""
        begin = self._delete_thread(thread_id)
        await self._home.here(self._transact(begin))

    async def aprune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """Delete all of the threads (``delete``), or all but the latest state (``keep_latest``)."""
        begin = self._prune(thread_ids, strategy)
        await self._home.here(self._transact(begin))

    async def adelete_for_runs(self, run_ids: Iterable[str]) -> None:
        """Delete the checkpoints of runs, with their writes."""
        begin = self._delete_for_runs(run_ids)
        await self._home.here(self._transact(begin))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy everything of one thread to another, which must be empty."""
        begin = self._copy_thread(source_thread_id, target_thread_id)
        await self._home.here(self._transact(begin))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Per channel, the writes since the nearest stored value on the way to the root."""
        operation = self._history(config, channels)
        return await self._home.here(self._run(operation, self._execute))

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """As :meth:`aput`, from another thread."""
        self._check_thread()
        config, operation = self._put(config, checkpoint, metadata, new_versions)
        self._home.wait(self._run(operation, self._store))
        return config

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Iterable[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """As :meth:`aput_writes`, from another thread."""
        self._check_thread()
        if statement := self._put_writes(config, writes, task_id, task_path):
            self._home.wait(self._ask(self._batches.write, statement))

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As :meth:`aget_tuple`, from another thread."""
        self._check_thread()
        return self._tuple(self._home.wait(self._ask(self._batches.read, self._get(config))))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """As :meth:`alist`, from another thread."""
        self._check_thread()
        return self._pages(self._listing(config, filter, before, limit))

    def delete_thread(self, thread_id: str) -> None:
        """As :meth:`adelete_thread`, from another thread."""
        self._check_thread()
        self._home.wait(self._transact(self._delete_thread(thread_id)))

    def prune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """As :meth:`aprune`, from another thread."""
        self._check_thread()
        self._home.wait(self._transact(self._prune(thread_ids, strategy)))

    def delete_for_runs(self, run_ids: Iterable[str]) -> None:
        """As :meth:`adelete_for_runs`, from another thread."""
        self._check_thread()
        self._home.wait(self._transact(self._delete_for_runs(run_ids)))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """As :meth:`acopy_thread`, from another thread."""
        self._check_thread()
        self._home.wait(self._transact(self._copy_thread(source_thread_id, target_thread_id)))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """As :meth:`aget_delta_channel_history`, from another thread."""
        self._check_thread()
        return self._home.wait(self._run(self._history(config, channels), self._execute))

    def _check_thread(self) -> None:
        self._check_open()
        rules.check_loop(self.loop, "AsyncPostgresSaver")

    async def _ask(self, run: Callable[..., Awaitable[Rows]], statement: Statement, *key: Hashable) -> Rows:
        self._check_open()
        with translated(self._where):
            return await run(statement, *key)

    def _execute(self, statement: Statement) -> Awaitable[Rows]:
        return self._ask(self._batches.alone, statement)

    def _store(self, statement: Statement) -> Awaitable[Rows]:
        return self._ask(self._batches.write, statement, _KEY(statement[1]))

    async def _run(self, operation: Steps[T], execute: Callable[[Statement], Awaitable[Rows]]) -> T:
        proceed: Callable[[], Statement] = operation.__next__
        try:
            while True:
                statement = proceed()
                try:
                    proceed = partial(operation.send, await execute(statement))
                except _EXPECTED as error:
                    proceed = partial(operation.throw, error)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def _transact(self, begin: Callable[[], Steps[None]]) -> None:
        async def work() -> None:
            async with self.pool.connection() as conn, conn.transaction():
                operation, rows = begin(), None
                while (statement := _next(operation, rows)) is not None:
                    rows = await conn.wait(conn.wire.run(*statement, prepare=False))

        with translated(self._where):
            await again_async(work, _CONFLICTS)

    def _pages(self, listing: Listing) -> Iterator[CheckpointTuple]:
        while True:
            self._check_thread()
            rows = self._home.wait(self._run(listing.page(), self._execute))
            if not rows:
                return
            for row in rows:
                yield steps.load(row, self.serde)


def _next(operation: Steps[None], rows: Rows | None) -> Statement | None:
    try:
        return operation.send(rows)  # type: ignore[arg-type]  # None begins
    except StopIteration:
        return None
