"""The lifespan of an ASGI application opens and closes with it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from httpx import ASGITransport, AsyncClient

import persistence
from persistence import asgi
from persistence.errors import ConnectError
from persistence.settings import get_settings
from tests.ops.conftest import counter, said, thread


def application(lifespan: asgi.Lifespan) -> FastAPI:
    app = FastAPI(lifespan=lifespan)

    @app.post("/add")
    async def add(request: Request) -> dict[str, int]:
        db: persistence.AsyncPersistence = request.app.state.persistence
        graph = counter().compile(checkpointer=db.checkpointer, store=db.store)
        state = await graph.aget_state(thread())
        result: dict[str, int] = await graph.ainvoke({"n": state.values.get("n", 0)}, thread())
        return result

    return app


async def call(app: FastAPI) -> dict[str, int]:
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=ASGITransport(app), base_url="http://test") as client,
    ):
        answer: dict[str, int] = (await client.post("/add")).json()
        return answer


async def test_the_conversation_survives_a_restart(table_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = application(asgi.make_lifespan(table_dsn))
    assert await call(app) == {"n": 1}
    assert await call(app) == {"n": 1 if table_dsn == "sqlite://" else 2}
    db: persistence.AsyncPersistence = app.state.persistence
    assert db.closed
    lines = said(caplog)
    assert lines.count("persistence starts with the application") == 2
    assert lines.count("persistence stops with the application") == 2


async def test_the_lifespan_takes_the_dsn_from_the_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSISTENCE_DSN", f"sqlite:///{tmp_path}/app.db")
    get_settings.cache_clear()
    app = application(asgi.lifespan)
    assert [await call(app), await call(app)] == [{"n": 1}, {"n": 2}]


async def test_the_application_does_not_start_without_its_database(tmp_path: Path) -> None:
    app = application(asgi.make_lifespan(f"sqlite:///{tmp_path}/no/such/folder.db"))
    with pytest.raises(ConnectError):
        await call(app)


async def test_an_error_of_the_application_still_closes() -> None:
    app = application(asgi.make_lifespan("memory://"))
    with pytest.raises(RuntimeError, match="crash"):
        async with app.router.lifespan_context(app):
            raise RuntimeError("crash")
    assert app.state.persistence.closed
