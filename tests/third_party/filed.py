"""A backend as somebody else might write one: a file to which every change is appended.

``FILED_BREAKS`` names a clause for it to break in each of some tests: ``test_limit=R4 test_other=F1``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from langgraph.store.base import BaseStore

import persistence
from persistence.backends.memory.savers import MemorySaver, _Memory, _Thread
from persistence.serializer import make_serializer

SERVER = persistence.ServerInfo("filed", "1")
BREAKS = dict(pair.split("=") for pair in os.environ.get("FILED_BREAKS", "").split())


def breaks() -> str | None:
    """The clause to break in the test that runs."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].partition("[")[0]
    return BREAKS.get(test)


class Journal(_Memory):
    """The threads of a file. Each change appends the threads that it changed; others read on from there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.position = 0

    def __enter__(self) -> Any:
        threads = super().__enter__()
        self.file = self.path.open("a+b")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.file.seek(self.position)
        with contextlib.suppress(EOFError, pickle.UnpicklingError):  # the end, or what a killed writer left
            while True:
                for name, thread in pickle.load(self.file):  # noqa: S301 - our own file
                    threads[name] = thread
                self.position = self.file.tell()
        self.file.truncate(self.position)
        self.before = {name: _copy(thread) for name, thread in threads.items()}
        return threads

    def __exit__(self, *exc_info: object) -> None:
        names = self.before.keys() | self.threads.keys()
        now = {name: self.threads.get(name, _Thread()) for name in names}
        if changed := [(name, thread) for name, thread in now.items() if thread != self.before.get(name)]:
            self.file.write(pickle.dumps(changed))
        self.file.flush()
        self.position = self.file.tell()
        self.file.close()
        super().__exit__(*exc_info)


def _copy(thread: _Thread) -> _Thread:
    """Rows are replaced, never changed."""
    writes = {place: dict(writes) for place, writes in thread.writes.items()}
    return _Thread(dict(thread.rows), writes, dict(thread.latest))


class FiledSaver(MemorySaver):
    """Checkpoints in a file."""

    def __init__(self, path: Path, serde: Any) -> None:
        super().__init__(serde=serde)
        self._memory = Journal(path)

    def put_writes(
        self, config: Any, writes: Iterable[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        super().put_writes(config, writes, task_id, "" if breaks() == "R8" else task_path)

    def list(self, config: Any, **kwargs: Any) -> Any:
        if breaks() == "R4":
            kwargs["limit"] = None
        return super().list(config, **kwargs)

    def delete_thread(self, thread_id: str) -> None:
        if breaks() != "F1":
            super().delete_thread(thread_id)


class FiledBackend:
    """One open file."""

    def __init__(self, path: Path, settings: persistence.Settings) -> None:
        self.checkpointer = FiledSaver(path, None if breaks() == "S1" else make_serializer(settings))

    def store(self) -> BaseStore:
        raise NotImplementedError  # never called without Capability.STORE

    def ping(self) -> persistence.ServerInfo:
        return SERVER

    def probe(self, timeout: float) -> persistence.Probe:
        return persistence.Probe(server=SERVER)

    def figures(self) -> Mapping[str, float]:
        return {}

    def close(self, timeout: float) -> None:
        self.checkpointer.close()


class AsyncFiledBackend(FiledBackend):
    """The same, for an event loop."""

    async def ping(self) -> persistence.ServerInfo:  # type: ignore[override]
        return SERVER

    async def probe(self, timeout: float) -> persistence.Probe:  # type: ignore[override]  # noqa: ASYNC109
        return super().probe(timeout)

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
