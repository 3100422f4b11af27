"""Connections that are lost: the next call works, without a restart of the application."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from psycopg_pool.base import AttemptWithBackoff

import persistence
from persistence.backends.postgres import connection
from persistence.dsn import Dsn
from persistence.errors import ConnectError
from persistence.settings import Settings
from tests.ops.conftest import OwnServer, counter, thread

KILL = """
SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
POOL = "&pool_min=4&pool_max=4"


def pool_of(db: Any) -> Any:
    return db._backend.pool


def fill(db: persistence.Persistence) -> None:
    """Have all connections of the pool open."""
    pool_of(db).wait(60)


def kill_all(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(KILL)


@pytest.fixture
def long_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool waits for a minute where it would for a second: a test shows whether it waits at all."""
    monkeypatch.setattr(AttemptWithBackoff, "INITIAL_DELAY", 60.0)


@pytest.fixture
def growing_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's third attempt comes after two minutes, unless its attempts have begun afresh."""
    monkeypatch.setattr(AttemptWithBackoff, "DELAY_BACKOFF", 120.0)


def test_the_next_call_works_after_the_server_closed_every_connection(
    postgres_dsn: str, long_delays: None
) -> None:
    """Without a back-off for each broken connection."""
    with persistence.open(postgres_dsn + POOL) as db:
        graph = counter().compile(checkpointer=db.checkpointer, store=db.store)
        graph.invoke({"n": 1}, thread())
        fill(db)
        kill_all(postgres_dsn)
        assert graph.get_state(thread()).values == {"n": 2}
        assert graph.invoke({"n": 5}, thread()) == {"n": 6}
        assert db.store is not None
        assert db.store.get(("a",), "k") is None


async def test_the_next_call_works_after_the_server_closed_every_connection_async(
    postgres_dsn: str, long_delays: None
) -> None:
    async with persistence.aopen(postgres_dsn + POOL) as db:
        graph = counter().compile(checkpointer=db.checkpointer, store=db.store)
        await graph.ainvoke({"n": 1}, thread())
        await pool_of(db).wait(60)
        await asyncio.to_thread(kill_all, postgres_dsn)
        assert (await graph.aget_state(thread())).values == {"n": 2}
        assert await graph.ainvoke({"n": 5}, thread()) == {"n": 6}
        assert db.store is not None
        assert await db.store.aget(("a",), "k") is None


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_the_server_needs_none_of_the_application(own_server: OwnServer, mode: str) -> None:
    with persistence.open(own_server.dsn() + POOL) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        graph.invoke({"n": 1}, thread(mode))
        fill(db)
        own_server.stop(mode)
        own_server.start()
        assert graph.get_state(thread(mode)).values == {"n": 2}
        assert graph.invoke({"n": 2}, thread(mode)) == {"n": 3}


async def test_a_restart_of_the_server_needs_none_of_the_application_async(own_server: OwnServer) -> None:
    async with persistence.aopen(own_server.dsn() + POOL) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        await graph.ainvoke({"n": 1}, thread("async"))
        await asyncio.to_thread(own_server.stop)
        await asyncio.to_thread(own_server.start)
        assert (await graph.aget_state(thread("async"))).values == {"n": 2}


def test_a_call_while_the_server_is_down_is_a_clear_error_and_the_next_one_works(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch, growing_delays: None
) -> None:
    """The outage is longer than all of the pool's attempts, so that nobody is left to try."""
    monkeypatch.setattr(connection, "RECONNECT_WINDOW", 1.0)
    with persistence.open(own_server.dsn() + POOL, settings=Settings(pool_timeout=60)) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        graph.invoke({"n": 1}, thread("outage"))
        own_server.stop()
        pool_of(db).timeout = 2
        try:
            for _ in range(2):
                with pytest.raises(ConnectError):
                    graph.get_state(thread("outage"))
            with pytest.raises(ConnectError):
                db.ping()
        finally:
            own_server.start()
        pool_of(db).timeout = 60
        assert graph.get_state(thread("outage")).values == {"n": 2}


def test_a_call_that_waits_is_served_when_the_server_is_back(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch, growing_delays: None
) -> None:
    """The pool's first attempts are over by then; new ones must have begun."""
    monkeypatch.setattr(connection, "RECONNECT_WINDOW", 0.5)
    with persistence.open(own_server.dsn() + POOL, settings=Settings(pool_timeout=60)) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        graph.invoke({"n": 1}, thread("waits"))
        fill(db)
        own_server.stop()
        back = threading.Timer(2, own_server.start)
        back.start()
        try:
            assert graph.get_state(thread("waits")).values == {"n": 2}
        finally:
            back.join()


async def test_a_call_while_the_server_is_down_is_a_clear_error_async(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RECONNECT_WINDOW", 1.0)
    async with persistence.aopen(own_server.dsn() + POOL, settings=Settings(pool_timeout=60)) as db:
        assert db.checkpointer is not None
        await asyncio.to_thread(own_server.stop)
        pool_of(db).timeout = 2
        try:
            for _ in range(2):
                with pytest.raises(ConnectError):
                    await db.checkpointer.aget_tuple(thread())
        finally:
            await asyncio.to_thread(own_server.start)
        pool_of(db).timeout = 60
        assert await db.checkpointer.aget_tuple(thread("nothing")) is None


def test_closing_is_bounded_while_the_server_is_down(own_server: OwnServer) -> None:
    db = persistence.open(own_server.dsn() + POOL, settings=Settings(close_timeout=2))
    own_server.stop()
    try:
        begin = time.monotonic()
        db.close()
        assert time.monotonic() - begin < 30
    finally:
        own_server.start()


def test_a_connection_in_use_is_not_asked_whether_it_works(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round trip per operation: only a connection that sat idle is asked."""
    asked: list[object] = []
    check = ConnectionPool.check_connection

    def counting(conn: Any) -> None:
        asked.append(conn)
        check(conn)

    monkeypatch.setattr(ConnectionPool, "check_connection", staticmethod(counting))
    with persistence.open(f"{postgres_dsn}&pool_max=1") as db:
        assert db.checkpointer is not None
        for _ in range(5):
            db.checkpointer.get_tuple(thread())
        assert asked == []
        monkeypatch.setattr(connection, "IDLE_BEFORE_ROUND_TRIP", 0.05)
        time.sleep(0.1)
        db.checkpointer.get_tuple(thread())
        assert len(asked) == 1


async def test_a_connection_in_use_is_not_asked_whether_it_works_async(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    check = AsyncConnectionPool.check_connection

    async def counting(conn: Any) -> None:
        asked.append(conn)
        await check(conn)

    monkeypatch.setattr(AsyncConnectionPool, "check_connection", staticmethod(counting))
    async with persistence.aopen(f"{postgres_dsn}&pool_max=1") as db:
        assert db.checkpointer is not None
        for _ in range(5):
            await db.checkpointer.aget_tuple(thread())
        assert asked == []
        monkeypatch.setattr(connection, "IDLE_BEFORE_ROUND_TRIP", 0.05)
        await asyncio.sleep(0.1)
        await db.checkpointer.aget_tuple(thread())
        assert len(asked) == 1


def test_a_notice_on_an_idle_connection_does_no_harm(postgres_dsn: str) -> None:
    """The socket is readable then, and the connection works all the same."""
    with persistence.open(f"{postgres_dsn}&pool_max=1") as db:
        assert db.checkpointer is not None
        with pool_of(db).connection() as conn:
            pid = conn.info.backend_pid
            conn.execute("LISTEN persistence")
        with psycopg.connect(postgres_dsn, autocommit=True) as other:
            other.execute("NOTIFY persistence")
        time.sleep(0.1)
        assert db.checkpointer.get_tuple(thread()) is None
        with pool_of(db).connection() as conn:
            assert conn.info.backend_pid == pid


async def test_a_pool_that_connects_ends_with_its_event_loop() -> None:
    """What ``asyncio.run`` does at its end: cancel all tasks once, and wait for them."""
    loop, others = asyncio.get_running_loop(), asyncio.all_tasks()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        dsn = Dsn.parse(f"postgresql://u@127.0.0.1:{server.getsockname()[1]}/d?sslmode=disable")
        pool = connection.make_async_pool(dsn, Settings())
        await pool.open()
        waiting, _ = await asyncio.wait_for(loop.sock_accept(server), 60)
        with waiting:  # it is never answered
            await asyncio.wait_for(loop.sock_recv(waiting, 1), 60)
            tasks = asyncio.all_tasks() - others
            for task in tasks:
                task.cancel()
            _, pending = await asyncio.wait(tasks, timeout=10)
        with suppress(asyncio.CancelledError):  # its workers were
            await pool.close()
    assert not pending
