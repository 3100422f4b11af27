"""One checkpointer for the whole process, opened when it is first asked for.

For applications without a place to keep a handle; those that have one pass the handle of
:func:`persistence.open` around instead. The DSN comes from the settings.

Synchronous code shares one handle in the process; each event loop has a handle of its own,
because connections belong to the loop that made them. A forked child begins anew.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from persistence.handle import AsyncPersistence, Persistence, aopen, open

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver


class _Slot:
    """The handle of synchronous code; the lock makes concurrent first calls share one opening."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.handle: Persistence | None = None


class _LoopSlot:
    """The handle of one event loop."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.handle: AsyncPersistence | None = None


class _Process:
    """All handles of this process."""

    def __init__(self) -> None:
        self.sync = _Slot()
        self.loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopSlot] = WeakKeyDictionary()
        self.loops_lock = threading.Lock()

    def loop_slot(self) -> _LoopSlot:
        loop = asyncio.get_running_loop()
        with self.loops_lock:
            return self.loops.setdefault(loop, _LoopSlot())


_process = _Process()
_of_parents: list[_Process] = []


def _begin_anew() -> None:
    """In a forked child: leave the parent's handles alone, locks that other threads held included.

    They are kept, not dropped: closing a connection in the child would end the parent's session.
    """
    global _process
    _of_parents.append(_process)
    _process = _Process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def get_checkpointer() -> BaseCheckpointSaver[Any] | None:
    """The process's saver for synchronous code; opens the database at the first call.

    Returns:
        The same object until it is closed; ``None`` where checkpointing is switched off.

    Raises:
        ConnectError: As :func:`persistence.open`; the next call tries again.
    """
    return _get().checkpointer


def setup_checkpointer() -> None:
    """Open the database and make the tables, at the start of the process. Idempotent."""
    _get().setup()


def close_checkpointer() -> None:
    """Close the process's handle, if there is one; the next :func:`get_checkpointer` opens anew."""
    slot = _process.sync
    with slot.lock:
        handle, slot.handle = slot.handle, None
    if handle is not None:
        handle.close()


async def aget_checkpointer() -> BaseCheckpointSaver[Any] | None:
    """As :func:`get_checkpointer`, for the running event loop."""
    return (await _aget()).checkpointer


async def asetup_checkpointer() -> None:
    """As :func:`setup_checkpointer`, for the running event loop."""
    await (await _aget()).setup()


async def aclose_checkpointer() -> None:
    """As :func:`close_checkpointer`, for the running event loop."""
    slot = _process.loop_slot()
    async with slot.lock:
        handle, slot.handle = slot.handle, None
    if handle is not None:
        await handle.close()


def _get() -> Persistence:
    slot = _process.sync
    with slot.lock:
        if slot.handle is None:
            slot.handle = open()
        return slot.handle


async def _aget() -> AsyncPersistence:
    slot = _process.loop_slot()
    async with slot.lock:
        if slot.handle is None:
            slot.handle = await aopen()
        return slot.handle
