"""Memory as a backend: nothing is kept after the process has ended."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

from persistence.backends.memory.savers import MemorySaver
from persistence.backends.memory.store import MemoryStore
from persistence.contract import AsyncBackend, Backend, Capability, Probe, Provider, ServerInfo
from persistence.serializer import make_serializer

_SERVER = ServerInfo("memory", "")


class MemoryProvider(Provider):
    """``memory://``: each opening has its own, empty, memory."""

    schemes = ("memory",)
    capabilities = frozenset({Capability.STORE})

    def open(self) -> Backend:
        """Make an empty saver."""
        return MemoryBackend(MemorySaver(serde=make_serializer(self.settings)))

    async def aopen(self) -> AsyncBackend:
        """Make an empty saver."""
        return AsyncMemoryBackend(MemorySaver(serde=make_serializer(self.settings)))


class _Memory:
    """What both colours share."""

    def __init__(self, saver: MemorySaver) -> None:
        self._saver = saver
        self._store: MemoryStore | None = None
        self._lock = threading.Lock()

    @property
    def checkpointer(self) -> BaseCheckpointSaver[str]:
        """The saver; one class answers both colours."""
        return self._saver

    def store(self) -> BaseStore:
        """LangGraph's store in memory."""
        with self._lock:
            if self._store is None:
                self._store = MemoryStore()
            return self._store

    def figures(self) -> Mapping[str, float]:
        """How many threads there are."""
        return {"threads": self._saver.thread_count()}

    def _probe(self) -> Probe:
        return Probe(server=_SERVER, read_seconds=0.0, write_seconds=0.0)


class MemoryBackend(_Memory):
    """Memory for synchronous code."""

    def ping(self) -> ServerInfo:
        """Memory answers."""
        return _SERVER

    def probe(self, timeout: float) -> Probe:
        """Memory is never slow."""
        return self._probe()

    def close(self, timeout: float) -> None:
        """Forget everything."""
        self._saver.close()


class AsyncMemoryBackend(_Memory):
    """Memory for an event loop."""

    async def ping(self) -> ServerInfo:
        """Memory answers."""
        return _SERVER

    async def probe(self, timeout: float) -> Probe:  # noqa: ASYNC109 - the contract's name
        """Memory is never slow."""
        return self._probe()

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the contract's name
        """Forget everything."""
        self._saver.close()
