"""Memory stands in for a database that did not answer, until it does (``PERSISTENCE_FALLBACK=memory``).

Graphs keep the saver and the store that they were compiled with, so these pass every call on: to memory
first, and to the database from the moment it can be opened. What was kept in memory meanwhile stays there;
the log and the health check say how much that is.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.store.base import BaseStore, Op, Result

from persistence.contract import AsyncBackend, Backend, Probe, ServerInfo
from persistence.errors import PersistenceError
from persistence.settings import Settings

logger = logging.getLogger("persistence")

B = TypeVar("B", Backend, AsyncBackend)


@dataclass(slots=True)
class Fallback:
    """Since when memory stands in, why, and what is kept only there.

    Attributes:
        reason: What the database said last.
        until: When the database came back, ``None`` while it has not.
        threads: The threads that were written to in memory.
    """

    reason: str
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    until: datetime | None = None
    threads: set[str] = field(default_factory=set)

    @property
    def active(self) -> bool:
        """Whether memory stands in now."""
        return self.until is None


class _Waits:
    """How long to wait before the next attempt, in seconds: doubled up to the configured maximum."""

    def __init__(self, settings: Settings) -> None:
        self._next = settings.connect_backoff
        self._most = settings.connect_backoff_max

    def next(self) -> float:
        """The next wait."""
        wait, self._next = self._next, min(self._next * 2, self._most)
        return wait


class _StandIn(Generic[B]):
    """What both colours share: the backend that serves now."""

    def __init__(self, memory: B, fallback: Fallback, where: str) -> None:
        self._now: B = memory
        self._memory: B = memory
        self._fallback = fallback
        self._where = where
        self._checkpointer = StandInSaver(self, fallback)
        self._store: StandInStore | None = None

    @property
    def now(self) -> B:
        """The backend that serves now."""
        return self._now

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """The saver that passes calls on."""
        return self._checkpointer

    def store(self) -> BaseStore:
        """The store that passes calls on."""
        if self._store is None:
            self._store = StandInStore(self)
        return self._store

    def figures(self) -> Mapping[str, float]:
        """Those of the backend that serves."""
        return self._now.figures()

    def _came_back(self, backend: B) -> None:
        self._now = backend
        self._fallback.until = datetime.now(UTC)
        logger.warning(
            "%s is back and serves from now on; %d threads were written to memory only since %s",
            self._where,
            len(self._fallback.threads),
            self._fallback.since.isoformat(timespec="seconds"),
            extra={"persistence_dsn": self._where, "persistence_threads": len(self._fallback.threads)},
        )
        threads = sorted(self._fallback.threads.copy())  # other threads may still add to it
        logger.debug("threads kept only in memory: %s", ", ".join(threads))

    def _still_away(self, error: PersistenceError) -> None:
        self._fallback.reason = error.message
        logger.info("memory still stands in for %s: %s", self._where, error.message)


class StandIn(_StandIn[Backend]):
    """Memory, and a thread that tries to open the database."""

    def __init__(
        self,
        memory: Backend,
        fallback: Fallback,
        where: str,
        settings: Settings,
        reopen: Callable[[], Backend],
    ) -> None:
        super().__init__(memory, fallback, where)
        self._settings = settings
        self._reopen = reopen
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._try, name="persistence-fallback", daemon=True)
        self._thread.start()

    def ping(self) -> ServerInfo:
        """Ask the backend that serves."""
        return self._now.ping()

    def probe(self, timeout: float) -> Probe:
        """Look at the backend that serves."""
        return self._now.probe(timeout)

    def close(self, timeout: float) -> None:
        """Stop trying, and close what serves."""
        self._closing.set()
        self._thread.join(timeout)
        if self._now is not self._memory:
            self._now.close(timeout)
        self._memory.close(timeout)

    def _try(self) -> None:
        waits = _Waits(self._settings)
        while not self._closing.wait(waits.next()):
            try:
                backend = self._reopen()
            except PersistenceError as error:
                self._still_away(error)
            else:
                if self._closing.is_set():
                    backend.close(self._settings.close_timeout)
                else:
                    self._came_back(backend)
                return


class AsyncStandIn(_StandIn[AsyncBackend]):
    """As :class:`StandIn`, with a task of the running event loop."""

    def __init__(
        self,
        memory: AsyncBackend,
        fallback: Fallback,
        where: str,
        settings: Settings,
        reopen: Callable[[], Awaitable[AsyncBackend]],
    ) -> None:
        super().__init__(memory, fallback, where)
        self._settings = settings
        self._reopen = reopen
        self._task = asyncio.create_task(self._try(), name="persistence-fallback")

    async def ping(self) -> ServerInfo:
        """Ask the backend that serves."""
        return await self._now.ping()

    async def probe(self, timeout: float) -> Probe:  # noqa: ASYNC109 - the contract's name
        """Look at the backend that serves."""
        return await self._now.probe(timeout)

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the contract's name
        """Stop trying, and close what serves."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._now is not self._memory:
            await self._now.close(timeout)
        await self._memory.close(timeout)

    async def _try(self) -> None:
        waits = _Waits(self._settings)
        while True:
            await asyncio.sleep(waits.next())
            try:
                backend = await self._reopen()
            except PersistenceError as error:
                self._still_away(error)
            else:
                self._came_back(backend)
                return


class StandInStore(BaseStore):
    """Passes every operation to the store of the backend that serves now."""

    supports_ttl = True

    def __init__(self, stand_in: _StandIn[Any]) -> None:
        self._stand_in = stand_in

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Pass them on."""
        found: list[Result] = self._stand_in.now.store().batch(ops)
        return found

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Pass them on."""
        found: list[Result] = await self._stand_in.now.store().abatch(ops)
        return found


class StandInSaver(BaseCheckpointSaver[str]):
    """Passes every call to the saver of the backend that serves now, and notes threads kept in memory."""

    def __init__(self, stand_in: _StandIn[Any], fallback: Fallback) -> None:
        self._stand_in = stand_in
        self._fallback = fallback
        self._serde_of_settings = stand_in.now.checkpointer.serde
        super().__init__(serde=self._serde_of_settings)

    @property
    def _saver(self) -> BaseCheckpointSaver[str]:
        saver: BaseCheckpointSaver[str] = self._stand_in.now.checkpointer
        if self.serde is not self._serde_of_settings:  # a clone of with_allowlist
            saver = copy.copy(saver)
            saver.serde = self.serde
        return saver

    def _note(self, config: RunnableConfig) -> None:
        if self._fallback.active:
            self._fallback.threads.add(str(config.get("configurable", {}).get("thread_id")))

    @property
    def config_specs(self) -> list[Any]:
        """Those of the saver that serves."""
        return self._saver.config_specs

    def get_next_version(self, current: str | None, channel: None) -> str:
        """Of the saver that serves."""
        return self._saver.get_next_version(current, channel)

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Pass it on."""
        self._note(config)
        return self._saver.put(config, checkpoint, metadata, new_versions)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Pass it on."""
        self._note(config)
        return await self._saver.aput(config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Iterable[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Pass them on."""
        self._note(config)
        self._saver.put_writes(config, list(writes), task_id, task_path)

    async def aput_writes(
        self, config: RunnableConfig, writes: Iterable[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Pass them on."""
        self._note(config)
        await self._saver.aput_writes(config, list(writes), task_id, task_path)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Pass it on."""
        return self._saver.get_tuple(config)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Pass it on."""
        return await self._saver.aget_tuple(config)

    def list(self, config: RunnableConfig | None, **arguments: Any) -> Iterator[CheckpointTuple]:
        """Pass it on."""
        return self._saver.list(config, **arguments)

    async def alist(self, config: RunnableConfig | None, **arguments: Any) -> AsyncIterator[CheckpointTuple]:
        """Pass it on."""
        async for found in self._saver.alist(config, **arguments):
            yield found

    def delete_thread(self, thread_id: str) -> None:
        """Pass it on."""
        self._saver.delete_thread(thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        """Pass it on."""
        await self._saver.adelete_thread(thread_id)

    def prune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """Pass it on."""
        self._saver.prune(thread_ids, strategy=strategy)  # type: ignore[arg-type]  # any iterable, with us

    async def aprune(self, thread_ids: Iterable[str], *, strategy: str = "keep_latest") -> None:
        """Pass it on."""
        await self._saver.aprune(thread_ids, strategy=strategy)  # type: ignore[arg-type]

    def delete_for_runs(self, run_ids: Iterable[str]) -> None:
        """Pass it on."""
        self._saver.delete_for_runs(run_ids)  # type: ignore[arg-type]

    async def adelete_for_runs(self, run_ids: Iterable[str]) -> None:
        """Pass it on."""
        await self._saver.adelete_for_runs(run_ids)  # type: ignore[arg-type]

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Pass it on."""
        self._saver.copy_thread(source_thread_id, target_thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Pass it on."""
        await self._saver.acopy_thread(source_thread_id, target_thread_id)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Pass it on."""
        return self._saver.get_delta_channel_history(config=config, channels=channels)  # type: ignore[arg-type]

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Iterable[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Pass it on."""
        return await self._saver.aget_delta_channel_history(config=config, channels=channels)  # type: ignore[arg-type]
