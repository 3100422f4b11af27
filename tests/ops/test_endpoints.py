"""Health and metrics over HTTP: mounted into an application, and alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from starlette.applications import Starlette
from starlette.routing import Mount

import persistence
from persistence import asgi, schema
from persistence.registry import provider_for
from persistence.settings import Settings
from tests.ops.conftest import OwnServer

ADDRESSES = ("/livez", "/readyz", "/health/checkpointer", "/metrics")


def fastapi(dsn: str) -> Any:
    app = FastAPI(lifespan=asgi.make_lifespan(dsn))
    app.mount("/persistence", asgi.Endpoints())
    return app


def starlette(dsn: str) -> Any:
    return Starlette(routes=[Mount("/persistence", app=asgi.Endpoints())], lifespan=asgi.make_lifespan(dsn))


@pytest.mark.parametrize("make", [fastapi, starlette])
async def test_mounted_into_an_application(make: Any, dsn: str) -> None:
    app = make(dsn)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=ASGITransport(app), base_url="http://test/persistence") as client,
    ):
        answers = {path: await client.get(path) for path in ADDRESSES}
        assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(ADDRESSES, 200)
        health = answers["/health/checkpointer"].json()
        assert health["ready"] is True
        assert health["checkpointer"] == type(app.state.persistence.checkpointer).__name__
        assert answers["/readyz"].json() == {"ready": True, "status": "ok", "problem": None}
        assert "persistence_ready{backend=" in answers["/metrics"].text
        assert (await client.get("/readyz/")).status_code == 200
        assert (await client.post("/readyz")).status_code == 405
        assert "/livez" in (await client.get("/elsewhere")).json()["error"]
        assert all(answer.headers["cache-control"] == "no-store" for answer in answers.values())


async def test_a_handle_of_ones_own() -> None:
    async with (
        persistence.aopen("memory://") as db,
        AsyncClient(transport=ASGITransport(asgi.Endpoints(db)), base_url="http://test") as client,
    ):
        assert (await client.get("/readyz")).status_code == 200


async def test_without_a_database() -> None:
    transport = ASGITransport(asgi.Endpoints())
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/livez")).status_code == 200
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert "lifespan" in answer.json()["problem"]["hint"]


async def test_probes_share_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = 0
    async with persistence.aopen("memory://") as db:
        health = db.health

        async def counted() -> persistence.Health:
            nonlocal checks
            checks += 1
            await asyncio.sleep(0.05)
            return await health()

        monkeypatch.setattr(db, "health", counted)
        monkeypatch.setattr(asgi, "_FRESH_FOR", 3600.0)
        endpoints = asgi.Endpoints(db)
        async with AsyncClient(transport=ASGITransport(endpoints), base_url="http://test") as client:
            answers = await asyncio.gather(*(client.get("/readyz") for _ in range(20)))
            assert {answer.status_code for answer in answers} == {200}
            assert checks == 1
            monkeypatch.setattr(asgi, "_FRESH_FOR", 0.0)
            await client.get("/readyz")
            assert checks == 2


@contextmanager
def served(dsn: str, health_timeout: str = "60") -> Iterator[httpx.Client]:
    """``persistence serve`` in a process of its own."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("persistence")), "serve", "--port", str(port)]
    env = {**os.environ, "PERSISTENCE_DSN": dsn, "PERSISTENCE_HEALTH_TIMEOUT": health_timeout}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                deadline = time.monotonic() + 60
                while True:
                    assert server.poll() is None, server.communicate()
                    try:
                        client.get("/livez").raise_for_status()
                    except httpx.ConnectError:
                        assert time.monotonic() < deadline
                        time.sleep(0.1)
                    else:
                        break
                yield client
            server.send_signal(signal.SIGTERM)
            output, _ = server.communicate(timeout=60)
            assert server.returncode == 128 + signal.SIGTERM, output
            assert "Traceback" not in output
        finally:
            server.kill()


def until(client: httpx.Client, status: int) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (answer := client.get("/readyz")).status_code != status:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    document: dict[str, Any] = answer.json()
    return document


def test_served_alone_on_sqlite(tmp_path: Path) -> None:
    dsn = f"sqlite:///{tmp_path}/x.db"
    with served(dsn) as client:
        assert "not there yet" in until(client, 503)["problem"]["message"]
        assert not (tmp_path / "x.db").exists()
        sqlite3.connect(tmp_path / "x.db").close()
        (tmp_path / "x.db").touch()
        assert until(client, 503)["problem"]["code"] in ("schema", "connect")
        schema.setup(provider_for(dsn, Settings()))
        until(client, 200)
        assert client.get("/health/checkpointer").json()["migrated"] is True
        assert "persistence_storage_database_bytes" in client.get("/metrics").text


def test_served_alone_while_the_server_stops_and_comes_back(own_server: OwnServer) -> None:
    own_server.stop()
    try:
        context = served(own_server.dsn(), "2")
        client = context.__enter__()
        assert until(client, 503)["problem"]["code"] == "connect"
        assert client.get("/livez").status_code == 200
    finally:
        own_server.start()
    assert until(client, 503)["problem"]["code"] == "schema"
    schema.setup(provider_for(own_server.dsn(), Settings()))
    until(client, 200)
    own_server.stop()
    try:
        until(client, 503)
        assert json.loads(client.get("/health/checkpointer").text)["connected"] is False
    finally:
        own_server.start()
    until(client, 200)
    context.__exit__(None, None, None)
