"""LangGraph's agent server keeps its state in the database of the settings: factories for ``langgraph.json``.

.. code-block:: json

    {"checkpointer": {"path": "persistence.langgraph_server:checkpointer"},
     "store": {"path": "persistence.langgraph_server:store"}}

The server enters each factory once per event loop and leaves it when it stops. On one loop both
share one open database, which is closed when the last of them leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from persistence.errors import ConfigurationError
from persistence.handle import AsyncPersistence, aopen

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.store.base import BaseStore

T = TypeVar("T")


class _Shared:
    """The handle of one event loop, and how many use it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.handle: AsyncPersistence | None = None
        self.users = 0


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()


@asynccontextmanager
async def checkpointer() -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """The saver for the running event loop.

    Raises:
        ConfigurationError: Checkpointing is switched off; the server cannot do without.
        ConnectError: The database does not answer after bounded attempts.
    """
    async with _handle() as db:
        yield _needed(db.checkpointer)


@asynccontextmanager
async def store() -> AsyncIterator[BaseStore]:
    """The store for the running event loop.

    Raises:
        ConfigurationError, ConnectError: As :func:`checkpointer`.
        UnsupportedError: The backend has no store.
    """
    async with _handle() as db:
        yield _needed(db.store)


@asynccontextmanager
async def _handle() -> AsyncIterator[AsyncPersistence]:
    shared = _of_loops.setdefault(asyncio.get_running_loop(), _Shared())
    async with shared.lock:
        if shared.handle is None:
            shared.handle = await aopen()
        shared.users += 1
        handle = shared.handle
    try:
        yield handle
    finally:
        async with shared.lock:
            shared.users -= 1
            if not shared.users:
                shared.handle = None
                await handle.close()


def _needed(part: T | None) -> T:
    if part is None:
        raise ConfigurationError(
            "checkpointing is off, and the agent server needs it",
            hint="unset PERSISTENCE_ENABLE_CHECKPOINTING, or take our paths out of langgraph.json",
        )
    return part
