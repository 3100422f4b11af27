"""What :func:`open` and :func:`aopen` give: one open database with its saver and its store."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Generator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self

from persistence import metrics
from persistence.contract import AsyncBackend, Backend, Capability, ServerInfo
from persistence.errors import ClosedError, UnsupportedError
from persistence.health import Health, Tables, TablesCheck, judge
from persistence.opening import B, Opened, Plan, aopen_backend, make_plan, make_tables, open_backend

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.store.base import BaseStore

    from persistence.dsn import Dsn
    from persistence.settings import Settings

logger = logging.getLogger("persistence")


def open(dsn: str | Dsn | None = None, *, settings: Settings | None = None) -> Persistence:
    """Open a database for synchronous code.

    Args:
        dsn: Which database; ``None`` takes it from the settings, and where these have none, memory.
        settings: Defaults to the settings from the environment (``PERSISTENCE_*``).

    Returns:
        The open handle, also a context manager.

    Raises:
        DsnError: The DSN is malformed, or its scheme is not known.
        MissingDriverError: The DSN's driver is not installed.
        ConnectError: The database does not answer after bounded attempts.
        SchemaError: The tables cannot be made.

    Example:
        >>> with open("memory://") as db:
        ...     graph = builder.compile(checkpointer=db.checkpointer, store=db.store)
    """
    return Persistence(open_backend(make_plan(dsn, settings)))


def aopen(dsn: str | Dsn | None = None, *, settings: Settings | None = None) -> Opening:
    """Open a database for the running event loop, by ``async with`` or by ``await``.

    Otherwise as :func:`open`.
    """
    return Opening(dsn, settings)


class _Clock:
    """Seconds that are left; never none, so that what needs no waiting is still found."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.01, self._end - time.monotonic())


class _Handle(Generic[B]):
    """What both colours share."""

    def __init__(self, opened: Opened[B]) -> None:
        self._plan: Plan = opened.plan
        self._backend: B | None = opened.backend
        self._fallback = opened.fallback
        self._opened_at = datetime.now(UTC)
        self._tables = None if opened.plan.provider is None else TablesCheck(opened.plan.provider)
        self._last_health: Health | None = None
        self._closed = False
        self._close_lock = threading.Lock()
        metrics.observe(self)

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any] | None:
        """The saver, for ``compile(checkpointer=...)``; ``None`` where checkpointing is switched off."""
        backend = self._open()
        return None if backend is None else backend.checkpointer

    @property
    def store(self) -> BaseStore | None:
        """The store, for ``compile(store=...)``; made at the first use, ``None`` where all is off.

        Raises:
            UnsupportedError: The backend has no store.
        """
        backend = self._open()
        provider = self._plan.provider
        if backend is None or provider is None:
            return None
        if Capability.STORE not in provider.capabilities:
            raise UnsupportedError(f"{provider.dsn.scheme} has no store: {provider.dsn}")
        return backend.store()

    @property
    def dsn(self) -> Dsn | None:
        """The DSN that was asked for; it shows no secret. ``None`` where there was none."""
        return self._plan.dsn

    @property
    def backend(self) -> str:
        """The scheme of the backend that serves, ``off`` where checkpointing is switched off."""
        return "memory" if self._is_stood_in_for else self._plan.mode

    @property
    def reason(self) -> str:
        """Why this backend serves."""
        return f"fallback: {self.degraded}" if self._is_stood_in_for else self._plan.reason

    @property
    def degraded(self) -> str | None:
        """Why memory stands in for the configured database now, or ``None``."""
        fallback = self._fallback
        return fallback.reason if fallback is not None and fallback.active else self._plan.degraded

    @property
    def _is_stood_in_for(self) -> bool:
        return self._fallback is not None and self._fallback.active

    @property
    def settings(self) -> Settings:
        """The settings in force, with the DSN's options in them."""
        return self._plan.settings

    @property
    def closed(self) -> bool:
        """Whether the handle was closed."""
        return self._closed

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<{type(self).__name__} {self.backend} {self.dsn or 'no DSN'}{state}>"

    def _open(self) -> B | None:
        if self._closed:
            raise ClosedError(f"{self!r} was closed", hint="open it again")
        return self._backend

    def figures(self) -> Mapping[str, float]:
        """How busy the connections are, by name; does no I/O. Empty where nothing is open."""
        return {} if self._closed or self._backend is None else self._backend.figures()

    def gauges(self) -> Mapping[str, float]:
        """The figures, with what the last health check found; does no I/O."""
        if self._closed:
            return {}
        fallback, last = self._fallback, self._last_health
        found = {**self.figures(), "degraded": float(self.degraded is not None)}
        found["memory_only_threads"] = len(fallback.threads) if fallback is not None else 0
        if last is not None:
            found["ready"] = float(last.ready)
            found |= {f"storage_{part}_bytes": size for part, size in last.storage.items()}
        return found

    def _known_health(self) -> Health:
        """What a health check knows without asking the database."""
        backend, fallback = self._backend, self._fallback
        degraded_since = fallback.since if fallback is not None else self._opened_at
        return Health(
            status="closed" if self._closed else ("off" if backend is None else "ok"),
            backend=self.backend,
            reason=self.reason,
            dsn=self.dsn.masked if self.dsn else None,
            schema=self.settings.db_schema,
            checkpointer=type(backend.checkpointer).__name__ if backend is not None else None,
            degraded=self.degraded,
            degraded_since=degraded_since if self.degraded else None,
            memory_only_threads=len(fallback.threads) if fallback is not None else 0,
            figures=self.figures(),
        )

    def _looked_at(self) -> TablesCheck | None:
        """The check of the tables, unless there are none to look at now."""
        return None if self._is_stood_in_for else self._tables

    def _take(self) -> B | None:
        """The backend to close, for the first caller only."""
        with self._close_lock:
            backend = None if self._closed else self._backend
            self._closed = True
            return backend


class Persistence(_Handle[Backend]):
    """An open database for synchronous code."""

    def ping(self) -> ServerInfo | None:
        """Ask the database who it is; ``None`` where checkpointing is off.

        Raises:
            ConnectError: It does not answer.
        """
        backend = self._open()
        return None if backend is None else backend.ping()

    def health(self, timeout: float | None = None) -> Health:
        """Look whether a saver could read and write now. Reports what is wrong instead of raising.

        Args:
            timeout: Seconds that it may take, also while the database hangs; ``None`` for the setting
                ``health_timeout``.
        """
        known, backend = self._known_health(), self._backend
        if self._closed or backend is None:
            return known
        clock = _Clock(timeout or self.settings.health_timeout)
        probe = backend.probe(clock.left())
        check = self._looked_at() if probe.server else None
        self._last_health = judge(known, probe, check.get(clock.left()) if check else Tables())
        return self._last_health

    def setup(self) -> None:
        """Make the tables, for those who open with ``setup_on_open`` off. Idempotent."""
        self._open()
        if self._plan.provider is not None and not self._is_stood_in_for:
            make_tables(self._plan.provider)

    def close(self) -> None:
        """Wait for acknowledged work and let go of everything, within ``close_timeout``. Idempotent."""
        if (backend := self._take()) is not None:
            backend.close(self.settings.close_timeout)
            logger.info("persistence closed: %s", self.backend)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            logger.exception("closing %s failed", self.dsn)  # the body's error goes on


class AsyncPersistence(_Handle[AsyncBackend]):
    """An open database for the event loop that opened it."""

    async def ping(self) -> ServerInfo | None:
        """As :meth:`Persistence.ping`."""
        backend = self._open()
        return None if backend is None else await backend.ping()

    async def health(self, timeout: float | None = None) -> Health:  # noqa: ASYNC109 - a bound on waiting
        """As :meth:`Persistence.health`."""
        known, backend = self._known_health(), self._backend
        if self._closed or backend is None:
            return known
        clock = _Clock(timeout or self.settings.health_timeout)
        probe = await backend.probe(clock.left())
        check = self._looked_at() if probe.server else None
        self._last_health = judge(known, probe, await check.aget(clock.left()) if check else Tables())
        return self._last_health

    async def setup(self) -> None:
        """As :meth:`Persistence.setup`."""
        self._open()
        if self._plan.provider is not None and not self._is_stood_in_for:
            await asyncio.to_thread(make_tables, self._plan.provider)

    async def close(self) -> None:
        """As :meth:`Persistence.close`."""
        if (backend := self._take()) is not None:
            await backend.close(self.settings.close_timeout)
            logger.info("persistence closed: %s", self.backend)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except Exception:
            if error is None:
                raise
            logger.exception("closing %s failed", self.dsn)  # the body's error goes on


class Opening:
    """The promise of an :class:`AsyncPersistence`: await it, or enter it."""

    def __init__(self, dsn: str | Dsn | None, settings: Settings | None) -> None:
        self._dsn = dsn
        self._settings = settings
        self._handle: AsyncPersistence | None = None

    def __await__(self) -> Generator[Any, None, AsyncPersistence]:
        return self._start().__await__()

    async def __aenter__(self) -> AsyncPersistence:
        self._handle = await self._start()
        return self._handle

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            await self._handle.__aexit__(kind, error, trace)

    async def _start(self) -> AsyncPersistence:
        # Planning may import a driver or read a file, which would hold the loop.
        plan = await asyncio.to_thread(make_plan, self._dsn, self._settings)
        return AsyncPersistence(await aopen_backend(plan))
