"""A saver under test: the same calls for every backend and both colours."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.base.id import uuid6

import persistence
from persistence.settings import Settings

T = TypeVar("T")
Tuples = list[CheckpointTuple]
Ids = list[str]


class LoopThread:
    """An event loop that runs in a thread, so that plain tests can drive asynchronous savers."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.start(work).result(60)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def stop(self) -> None:
        self.run(self._finish())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(60)
        self.loop.close()

    async def _finish(self) -> None:
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()


@dataclass
class Target:
    """An empty database, and what the suite must know about it."""

    backend: str
    """A name, for reports."""
    colour: str
    """``"sync"`` or ``"async"``: the fixture of that name."""
    dsn: str
    password: str | None = None
    """The password in the DSN; it must not be seen anywhere."""
    has_tables: bool = False
    """The tables are there already, and opening the database need not make them."""
    raw: Callable[[], bytes] | None = None
    """Everything that is stored, as bytes, where it can be looked at from outside."""
    preamble: str = ""
    """Python that other processes run first, where the scheme is not found by its entry point."""

    @property
    def is_durable(self) -> bool:
        """What was stored is there after the close."""
        return self.raw is not None


@dataclass
class Subject:
    """An open saver, and its calls without the colour."""

    target: Target
    settings: Settings
    loop: LoopThread
    handle: Any = None
    saver: BaseCheckpointSaver[Any] = field(init=False)

    def __post_init__(self) -> None:
        if self.is_async:
            self.handle = self.loop.run(self._aopen())
        else:
            self.handle = persistence.open(self.target.dsn, settings=self.settings)
        self.saver = self.handle.checkpointer

    async def _aopen(self) -> Any:
        return await persistence.aopen(self.target.dsn, settings=self.settings)

    @property
    def is_async(self) -> bool:
        return self.target.colour == "async"

    def close(self) -> None:
        if self.is_async:
            self.loop.run(self.handle.close())
        else:
            self.handle.close()

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method in the subject's own colour; listings come as lists."""
        if not self.is_async:
            result = getattr(self.saver, name)(*args, **kwargs)
            return list(result) if name == "list" else result
        method = getattr(self.saver, "a" + name)
        return self.loop.run(_collect(method(*args, **kwargs)) if name == "list" else method(*args, **kwargs))

    def put(
        self,
        thread: Any,
        id_: Any = None,
        values: Mapping[str, Any] | None = None,
        *,
        parent: str | None = None,
        ns: str | None = "",
        metadata: Any = None,
        versions: Mapping[str, Any] | None = None,
        new: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> RunnableConfig:
        """Store a checkpoint whose channels are all new, unless told otherwise."""
        id_ = id_ if id_ is not None else str(uuid6())
        versions = versions if versions is not None else {c: f"{id_}.{c}" for c in values or {}}
        checkpoint = bare(id_, values or {}, versions) | more
        config = at(thread, parent, ns)
        stored: RunnableConfig = self.call(
            "put", config, checkpoint, metadata or {}, dict(versions if new is None else new)
        )
        return stored

    def get(self, thread: Any, id_: str | None = None, ns: str | None = "") -> CheckpointTuple | None:
        found: CheckpointTuple | None = self.call("get_tuple", at(thread, id_, ns))
        return found

    def values(self, thread: Any, id_: str | None = None, ns: str = "") -> dict[str, Any]:
        found = self.get(thread, id_, ns)
        assert found is not None
        return found.checkpoint["channel_values"]

    def writes(self, thread: Any, id_: str | None = None, ns: str = "") -> Any:
        found = self.get(thread, id_, ns)
        assert found is not None
        return found.pending_writes or []

    def list(self, config: Any = None, **kwargs: Any) -> Tuples:
        found: Tuples = self.call("list", config, **kwargs)
        return found

    def ids(self, config: Any = None, **kwargs: Any) -> Ids:
        return [found.config["configurable"]["checkpoint_id"] for found in self.list(config, **kwargs)]

    def put_writes(
        self, config: RunnableConfig, writes: Iterable[Any], task: Any = "task", path: str = ""
    ) -> None:
        self.call("put_writes", config, writes, task, path)

    def history(self, config: RunnableConfig, channels: Iterable[str]) -> Any:
        return self.call("get_delta_channel_history", config=config, channels=channels)


def at(thread: Any, id_: str | None = None, ns: str | None = "") -> RunnableConfig:
    """A config that names a checkpoint, or the latest."""
    configurable: dict[str, Any] = {"thread_id": thread, "checkpoint_ns": ns}
    if id_ is not None:
        configurable["checkpoint_id"] = id_
    return {"configurable": configurable}


def bare(id_: Any, values: Mapping[str, Any], versions: Mapping[str, Any] | None = None) -> Any:
    """A checkpoint as LangGraph makes them."""
    return {
        "v": 4,
        "id": id_,
        "ts": "2025-01-01T00:00:00+00:00",
        "channel_values": dict(values),
        "channel_versions": dict.fromkeys(values, 1) if versions is None else dict(versions),
        "versions_seen": {},
        "updated_channels": None,
    }


def fresh() -> str:
    """A thread that nobody has used."""
    return f"thread-{uuid.uuid4().hex}"


async def _collect(items: Any) -> list[Any]:
    return [item async for item in items]


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same type, all the way down; NaN is itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or (left != left and right != right)
