"""A backend as somebody else might write one: all conversations in one file, rewritten at every change.

Slow, and the same as every other backend. ``FILED_BREAKS`` names a clause for it to break.
"""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from langgraph.store.base import BaseStore

import persistence
from persistence.backends.memory.savers import MemorySaver, _Memory
from persistence.serializer import make_serializer

BREAKS = os.environ.get("FILED_BREAKS")


class Journal(_Memory):
    """The threads of a file, for as long as somebody looks at them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.depth = 0
        self.before = b""

    def __enter__(self) -> Any:
        threads = super().__enter__()
        self.depth += 1
        if self.depth == 1:
            self.lock_file = self.path.with_suffix(".lock").open("w")
            fcntl.flock(self.lock_file, fcntl.LOCK_EX)
            self.before = self.path.read_bytes() if self.path.exists() else b""
            threads.clear()
            threads.update(pickle.loads(self.before) if self.before else {})  # noqa: S301 - our own file
        return threads

    def __exit__(self, *exc_info: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            after = pickle.dumps(self.threads)
            if exc_info[0] is None and after != self.before:
                spare = self.path.with_suffix(".new")  # a kill leaves the old file or the new one
                spare.write_bytes(after)
                spare.rename(self.path)
            self.lock_file.close()
        super().__exit__(*exc_info)


class FiledSaver(MemorySaver):
    """Checkpoints in a file."""

    def __init__(self, path: Path, serde: Any) -> None:
        super().__init__(serde=serde)
        self._memory = Journal(path)

    def put_writes(
        self, config: Any, writes: Iterable[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        super().put_writes(config, writes, task_id, "" if BREAKS == "R8" else task_path)

    def list(self, config: Any, **kwargs: Any) -> Any:
        if BREAKS == "R4":
            kwargs["limit"] = None
        return super().list(config, **kwargs)

    def delete_thread(self, thread_id: str) -> None:
        if BREAKS != "F1":
            super().delete_thread(thread_id)


class FiledBackend:
    """One open file."""

    def __init__(self, path: Path, settings: persistence.Settings) -> None:
        self.checkpointer = FiledSaver(path, None if BREAKS == "S1" else make_serializer(settings))

    def store(self) -> BaseStore:
        raise NotImplementedError  # never called without Capability.STORE

    def ping(self) -> persistence.ServerInfo:
        return persistence.ServerInfo("filed", "1")

    def close(self, timeout: float) -> None:
        self.checkpointer.close()


class AsyncFiledBackend(FiledBackend):
    """The same, for an event loop."""

    async def ping(self) -> persistence.ServerInfo:  # type: ignore[override]
        return super().ping()

    async def close(self, timeout: float) -> None:  # type: ignore[override]  # noqa: ASYNC109
        super().close(timeout)


class FiledProvider(persistence.Provider):
    """``filed:///path``."""

    schemes = ("filed",)
    capabilities = frozenset({persistence.Capability.DURABLE})

    @property
    def path(self) -> Path:
        return Path(self.dsn.url.removeprefix("filed://"))

    def open(self) -> FiledBackend:
        return FiledBackend(self.path, self.settings)

    async def aopen(self) -> AsyncFiledBackend:
        return AsyncFiledBackend(self.path, self.settings)


persistence.register(FiledProvider)
