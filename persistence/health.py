"""Is the persistence usable? Asked of the open database, not of the configuration, and answered in time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from persistence import schema
from persistence.contract import Capability, Probe, Provider
from persistence.dsn import Dsn
from persistence.errors import ConnectError, PersistenceError, SchemaError
from persistence.settings import Settings

_SCHEMA_KNOWN_FOR = 30.0
"""Seconds for which tables that were as needed are taken to be so still; the canary notices their loss."""

Status = Literal["ok", "degraded", "unavailable", "off", "closed"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the database is not usable; ``code`` names the entry in ``docs/troubleshooting.md``."""

    code: str
    message: str
    hint: str | None = None
    exit_code: int = PersistenceError.exit_code

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """What an error says."""
        if isinstance(error, PersistenceError):
            return cls(error.code, error.message, error.hint, error.exit_code)
        return cls(PersistenceError.code, f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Health:
    """What one health check found.

    Attributes:
        status: ``ok``; ``degraded`` while memory stands in for the database; ``unavailable`` while a saver
            could not read and write; ``off`` where checkpointing is switched off; ``closed``.
        ready: Whether the application should get requests: ``ok``, ``off``, and ``degraded``, for which
            the policy decided when it allowed memory.
        backend: The scheme that serves now.
        reason: Why this backend serves.
        dsn: The configured DSN, without secrets.
        schema: The configured Postgres schema.
        checkpointer: The saver's class.
        server: Who answered, with version.
        connected: Whether somebody answered.
        read_ms: Milliseconds for reading a row, ``None`` where it could not be read.
        write_ms: Milliseconds for writing one durably, ``None`` where it could not be written.
        migrated: Whether all tables are as needed, ``None`` where that is not known.
        revision: The revision of our own tables.
        differences: In what way the tables are not as needed.
        degraded: Why memory stands in for the database.
        degraded_since: Since when.
        memory_only_threads: How many threads were written to memory only since the database was opened.
        problem: Why it is not ``ok``.
        figures: How busy the connections are.
        storage: Bytes on disk by table, or by file.
        checked_at: When the check began.
        seconds: How long it took.
    """

    status: Status
    backend: str
    reason: str = ""
    dsn: str | None = None
    schema: str | None = None
    checkpointer: str | None = None
    server: str | None = None
    connected: bool = False
    read_ms: float | None = None
    write_ms: float | None = None
    migrated: bool | None = None
    revision: str | None = None
    differences: tuple[str, ...] = ()
    degraded: str | None = None
    degraded_since: datetime | None = None
    memory_only_threads: int = 0
    problem: Problem | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    storage: Mapping[str, int] = field(default_factory=dict)
    checked_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether the application should get requests."""
        return self.status in ("ok", "degraded", "off")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``--json`` and HTTP."""
        document = {"status": self.status, "ready": self.ready} | asdict(self)
        for name in ("degraded_since", "checked_at"):
            if (moment := document[name]) is not None:
                document[name] = moment.isoformat(timespec="milliseconds")
        if document["problem"] is not None:
            del document["problem"]["exit_code"]
        return document


@dataclass(frozen=True, slots=True)
class Tables:
    """The state of the tables, as far as it is known, as of ``at`` on the monotonic clock."""

    differences: tuple[str, ...] | None = None
    revision: str | None = None
    error: Exception | None = None
    at: float = 0.0

    @property
    def as_needed(self) -> bool | None:
        """``None`` where it is not known."""
        return None if self.differences is None else not self.differences


class TablesCheck:
    """Looks at the tables in a thread of its own: a database that hangs must not hold anybody up."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._known = Tables()
        self._running: Future[Tables] | None = None
        self._lock = threading.Lock()

    def get(self, timeout: float) -> Tables:
        """What is known, or what is found within ``timeout`` seconds."""
        if (look := self._begin()) is None:
            return self._known
        try:
            self._known = look.result(timeout)
        except FutureTimeoutError:
            return self._late(timeout)
        return self._known

    async def aget(self, timeout: float) -> Tables:  # noqa: ASYNC109 - the thread goes on
        """As :meth:`get`."""
        if (look := self._begin()) is None:
            return self._known
        done, _ = await asyncio.wait([asyncio.wrap_future(look)], timeout=timeout)
        if not done:
            return self._late(timeout)
        self._known = look.result()
        return self._known

    def _late(self, timeout: float) -> Tables:
        return Tables(error=ConnectError(f"the tables could not be read within {timeout:.1f} s"))

    def _begin(self) -> Future[Tables] | None:
        """The look that runs now or begins now; ``None`` where none is needed."""
        if Capability.TABLES not in self._provider.capabilities:
            return None
        if self._known.as_needed and time.monotonic() - self._known.at < _SCHEMA_KNOWN_FOR:
            return None
        with self._lock:
            if self._running is None or self._running.done():
                self._running = Future()
                threading.Thread(
                    target=self._look, args=(self._running,), name="persistence-health", daemon=True
                ).start()
            return self._running

    def _look(self, result: Future[Tables]) -> None:
        try:
            differences, revision = schema.look(self._provider)
            found = Tables(tuple(map(str, differences)), revision, at=time.monotonic())
        except Exception as error:  # noqa: BLE001 - it is what the check reports
            found = Tables(error=error)
        result.set_result(found)


def settings_to_look(settings: Settings) -> Settings:
    """Settings to open a database with only to look at it: once, in time, and without making anything."""
    return settings.model_copy(
        update={
            "setup_on_open": False,
            "fallback": "never",
            "connect_attempts": 1,
            "connect_timeout": settings.health_timeout,
            "sqlite_busy_timeout": settings.health_timeout,
        }
    )


def require_file(dsn: Dsn) -> None:
    """Raise ``ConnectError`` where the DSN's file is not there yet: opening it, to look, would make it."""
    if dsn.path is not None and not Path(dsn.path).exists():
        raise ConnectError(
            f"not there yet: {dsn}", hint="the first use makes it, or: persistence setup", transient=False
        )


def unopened(dsn: Dsn, error: PersistenceError) -> Health:
    """The health of a database that cannot even be opened."""
    return Health("unavailable", dsn.scheme, dsn=dsn.masked, problem=Problem.of(error))


def judge(base: Health, probe: Probe, tables: Tables) -> Health:
    """What is known beforehand, with what a probe and a look at the tables say."""
    error = probe.error
    if tables.differences:
        error = SchemaError(
            f"the tables are not as needed: {'; '.join(tables.differences)}", hint=f"run: {schema.SETUP}"
        )
    error = error or tables.error
    status: Status = "unavailable" if error else ("degraded" if base.degraded else "ok")
    return replace(
        base,
        status=status,
        server=f"{probe.server.product} {probe.server.version}".strip() if probe.server else None,
        connected=probe.server is not None,
        read_ms=_milliseconds(probe.read_seconds),
        write_ms=_milliseconds(probe.write_seconds),
        migrated=tables.as_needed,
        revision=tables.revision,
        differences=tables.differences or (),
        problem=Problem.of(error) if error else None,
        storage=probe.storage,
        seconds=round((datetime.now(UTC) - base.checked_at).total_seconds(), 3),
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
