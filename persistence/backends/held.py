"""An open backend that lets go of something else, a server of its own, when it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

from persistence.contract import AsyncBackend, Backend, Probe, ServerInfo

B = TypeVar("B", Backend, AsyncBackend)


class _Parts(Generic[B]):
    """What both colours share."""

    def __init__(self, backend: B, release: Callable[[], None]) -> None:
        self._backend: B = backend
        self._release = release

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """The backend's saver."""
        return self._backend.checkpointer

    def store(self) -> BaseStore:
        """The backend's store."""
        return self._backend.store()

    def figures(self) -> Mapping[str, float]:
        """The backend's."""
        return self._backend.figures()


class Held(_Parts[Backend]):
    """An open backend that lets the server go when it is closed."""

    def ping(self) -> ServerInfo:
        """Ask the server."""
        return self._backend.ping()

    def probe(self, timeout: float) -> Probe:
        """Look at the server."""
        return self._backend.probe(timeout)

    def close(self, timeout: float) -> None:
        """Close the backend, then let go."""
        try:
            self._backend.close(timeout)
        finally:
            self._release()


class AsyncHeld(_Parts[AsyncBackend]):
    """As :class:`Held`, for an event loop."""

    async def ping(self) -> ServerInfo:
        """Ask the server."""
        return await self._backend.ping()

    async def probe(self, timeout: float) -> Probe:  # noqa: ASYNC109 - the contract's name
        """Look at the server."""
        return await self._backend.probe(timeout)

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the contract's name
        """Close the backend, then let go."""
        try:
            await self._backend.close(timeout)
        finally:
            await asyncio.to_thread(self._release)
