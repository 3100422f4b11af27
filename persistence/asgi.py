"""Persistence in an ASGI application: open and close with it, and health and metrics over HTTP.

Works with every framework; none is imported here::

    app = FastAPI(lifespan=persistence.asgi.lifespan)  # the handle is app.state.persistence
    app.mount("/persistence", persistence.asgi.Endpoints())

``persistence serve`` runs the endpoints alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from persistence import metrics
from persistence.errors import ConnectError, MissingDriverError, PersistenceError
from persistence.handle import AsyncPersistence, aopen
from persistence.health import Health, Problem, require_file, settings_to_look, unopened

if TYPE_CHECKING:
    from persistence.dsn import Dsn
    from persistence.settings import Settings

logger = logging.getLogger("persistence")

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]

_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]
_Receive = Callable[[], Awaitable[_Message]]

_FRESH_FOR = 1.0
"""Seconds for which a health check answers for the probes that follow."""


def make_lifespan(dsn: str | Dsn | None = None, *, settings: Settings | None = None) -> Lifespan:
    """A lifespan for the given database instead of the one in the settings.

    Example:
        >>> app = FastAPI(lifespan=make_lifespan("sqlite:///chat.db"))
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        logger.info("persistence starts with the application")
        async with aopen(dsn, settings=settings) as db:
            app.state.persistence = db
            yield
            logger.info("persistence stops with the application")

    return lifespan


lifespan = make_lifespan()
"""Opens the database of the settings, read when the application starts."""


class Endpoints:
    """An ASGI application with four addresses, to mount into another one or to run alone.

    - ``/livez``: 200 while the process answers.
    - ``/readyz``: 200 while the persistence is usable, else 503, with the reason.
    - ``/health/checkpointer``: all of :class:`persistence.Health` as JSON, with the same status codes.
    - ``/metrics``: for Prometheus (needs the extra ``serve``).

    The answers name the database's host, schema and tables: they are for the inside of a network.
    """

    def __init__(self, db: AsyncPersistence | None = None) -> None:
        """``db`` is the handle to ask; without it ``app.state.persistence`` of the application around."""
        self._db = db
        self._latest: tuple[float, Health] | None = None
        self._checking = asyncio.Lock()
        try:
            metrics.enable_prometheus()
        except MissingDriverError as error:
            logger.info("/metrics is not available: %s", error)

    async def __call__(self, scope: Mapping[str, Any], receive: _Receive, send: _Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"these endpoints answer HTTP, not {scope['type']}")
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        answer = self._ANSWERS.get(path)
        if answer is None:
            await _send_json(send, 404, {"error": f"no such address; there are: {', '.join(self._ANSWERS)}"})
        elif scope["method"] not in ("GET", "HEAD"):
            await _send_json(send, 405, {"error": "GET only"})
        else:
            try:
                await answer(self, scope, send)
            except PersistenceError as error:
                await _send_json(send, 503, {"ready": False, "problem": asdict(Problem.of(error))})

    async def health(self, scope: Mapping[str, Any]) -> Health:
        """The latest health, at most a second old; concurrent requests share one check."""
        async with self._checking:
            if self._latest is None or time.monotonic() - self._latest[0] > _FRESH_FOR:
                found = await (await self.handle(scope)).health()
                self._latest = time.monotonic(), found
            return self._latest[1]

    async def handle(self, scope: Mapping[str, Any]) -> AsyncPersistence:
        """The open database."""
        if self._db is not None:
            return self._db
        db = getattr(getattr(scope.get("app"), "state", None), "persistence", None)
        if not isinstance(db, AsyncPersistence):
            raise PersistenceError(
                "these endpoints know no database",
                hint="give the application persistence.asgi.lifespan, or pass the handle: Endpoints(db)",
            )
        return db

    async def _livez(self, scope: Mapping[str, Any], send: _Send) -> None:
        await _send_json(send, 200, {"status": "alive"})

    async def _readyz(self, scope: Mapping[str, Any], send: _Send) -> None:
        found = await self.health(scope)
        document = {"ready": found.ready, "status": found.status, "problem": found.to_json()["problem"]}
        await _send_json(send, 200 if found.ready else 503, document)

    async def _checkpointer(self, scope: Mapping[str, Any], send: _Send) -> None:
        found = await self.health(scope)
        await _send_json(send, 200 if found.ready else 503, found.to_json())

    async def _metrics(self, scope: Mapping[str, Any], send: _Send) -> None:
        await self.health(scope)  # readiness and sizes are of now
        try:
            kind, body = metrics.exposition()
        except MissingDriverError as error:
            await _send_json(send, 501, {"error": str(error)})
        else:
            await _send(send, 200, kind, body)

    _ANSWERS: Mapping[str, Callable[[Endpoints, Mapping[str, Any], _Send], Awaitable[None]]] = {
        "/livez": _livez,
        "/readyz": _readyz,
        "/health/checkpointer": _checkpointer,
        "/metrics": _metrics,
    }


class Standalone(Endpoints):
    """The endpoints with a database of their own, opened when it first answers, for ``persistence serve``.

    They make no tables: whether these are there is what they are asked.
    """

    def __init__(self, dsn: Dsn, settings: Settings) -> None:
        super().__init__()
        self._dsn = dsn
        self._settings = settings_to_look(settings)

    async def __call__(self, scope: Mapping[str, Any], receive: _Receive, send: _Send) -> None:
        """Answer one request, or take part in the server's start and end."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def health(self, scope: Mapping[str, Any]) -> Health:
        """As :meth:`Endpoints.health`; a database that cannot be opened is unavailable."""
        try:
            return await super().health(scope)
        except PersistenceError as error:
            return unopened(self._dsn, error)

    async def handle(self, scope: Mapping[str, Any]) -> AsyncPersistence:
        """The open database, opened where it is not yet."""
        if self._db is None:
            require_file(self._dsn)
            seconds = self._settings.health_timeout
            try:
                async with asyncio.timeout(seconds):
                    self._db = await aopen(self._dsn, settings=self._settings)
            except TimeoutError:
                raise ConnectError(f"no answer within {seconds:g} s: {self._dsn}") from None
        return self._db

    async def _live(self, receive: _Receive, send: _Send) -> None:
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        if self._db is not None:
            await self._db.close()
        await send({"type": "lifespan.shutdown.complete"})


async def _send_json(send: _Send, status: int, document: Mapping[str, Any]) -> None:
    await _send(send, status, "application/json", json.dumps(document, indent=2).encode() + b"\n")


async def _send(send: _Send, status: int, kind: str, body: bytes) -> None:
    headers = [
        (b"content-type", kind.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
