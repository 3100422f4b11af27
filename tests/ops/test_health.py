"""Health stays right and fast while the database is stopped, hangs, is read-only, is full, is unmigrated."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import psycopg
import pytest

import persistence
from persistence import schema
from persistence.health import Health
from persistence.settings import Settings
from tests.ops.conftest import OwnServer, counter, thread

# Where somebody answers, however slow the machine is; and how long the database's own waits would be.
PATIENT = {"health_timeout": 60, "pool_timeout": 120, "sqlite_busy_timeout": 120}
# Where nobody answers. Without a bound a check would take 120 s, or for ever; the machine may be slow.
BOUNDED = {"health_timeout": 1}
IN_TIME = 40.0

Check = Callable[..., Coroutine[Any, Any, Health]]


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def opened(colour: str, dsn: str, **values: Any) -> AsyncIterator[tuple[Any, Check]]:
    """A handle of either colour, and its health check."""
    settings = Settings(**PATIENT | values)
    if colour == "async":
        async with persistence.aopen(dsn, settings=settings) as db:
            yield db, db.health
        return
    handle = await asyncio.to_thread(persistence.open, dsn, settings=settings)
    try:
        yield handle, partial(asyncio.to_thread, handle.health)
    finally:
        await asyncio.to_thread(handle.close)


async def in_time(check: Check) -> Health:
    found = await asyncio.wait_for(check(), IN_TIME)
    json.dumps(found.to_json())
    return found


async def until_ready(check: Check) -> Health:
    deadline = time.monotonic() + 60
    while not (found := await check()).ready:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.1)
    return found


async def test_a_usable_database(colour: str, dsn: str) -> None:
    async with opened(colour, dsn) as (db, check):
        found = await in_time(check)
        assert (found.status, found.ready, found.problem) == ("ok", True, None)
        assert found.connected
        assert found.server
        assert found.checkpointer == type(db.checkpointer).__name__
        assert found.read_ms is not None
        assert found.write_ms is not None
        assert found.figures
        assert found.migrated is (None if dsn == "memory://" else True)
        if dsn.startswith("postgres"):
            assert found.storage["checkpoints"] > 0
            assert found.figures["pool_size"] >= 1


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_stops_and_comes_back(colour: str, own_server: OwnServer, mode: str) -> None:
    async with opened(colour, own_server.dsn() + "&pool_min=2", **BOUNDED) as (_, check):
        await until_ready(check)
        await asyncio.to_thread(own_server.stop, mode)
        try:
            for _ in range(2):
                found = await in_time(check)
                assert (found.status, found.connected) == ("unavailable", False)
                assert found.problem is not None
                assert found.problem.code == "connect"
        finally:
            await asyncio.to_thread(own_server.start)
        assert (await until_ready(check)).write_ms is not None


def kill_others(conn: psycopg.Connection[Any]) -> None:
    """End all other connections to the database: new ones have its new settings."""
    others = b"FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
    pids = [pid for (pid,) in conn.execute(b"SELECT pid " + others)]
    conn.execute("SELECT pg_terminate_backend(pid, 60000) FROM unnest(%s::int[]) AS t(pid)", [pids])


@contextmanager
def hanging(server: OwnServer) -> Iterator[None]:
    """All processes of the server stand still: connections stay open, and nobody answers."""
    postmaster = int((server.folder / "data" / "postmaster.pid").read_text().split()[0])

    def send(signum: int) -> None:
        os.kill(postmaster, signum)
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended meanwhile
                if int(entry.read_text().rpartition(")")[2].split()[1]) == postmaster:
                    os.kill(int(entry.parent.name), signum)

    send(signal.SIGSTOP)
    try:
        yield
    finally:
        send(signal.SIGCONT)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("idle", [False, True], ids=["busy", "idle"])
async def test_a_server_that_hangs(
    colour: str, own_server: OwnServer, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``idle``: the pool asks the connection itself whether it works, and hangs there."""
    if idle:
        monkeypatch.setattr("persistence.backends.postgres.connection.IDLE_BEFORE_ROUND_TRIP", -1)
    async with opened(colour, own_server.dsn() + "&pool_min=2", **BOUNDED) as (_, check):
        await until_ready(check)
        with hanging(own_server):
            for _ in range(2):
                found = await in_time(check)
                assert found.status == "unavailable"
                assert found.problem is not None
                assert found.problem.code == "connect"
        await until_ready(check)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_command_is_in_time_while_the_server_hangs(own_server: OwnServer) -> None:
    command = [
        str(Path(sys.executable).with_name("persistence")),
        "status",
        "--ready",
        "--dsn",
        own_server.dsn(),
    ]
    patient = os.environ | {"PERSISTENCE_CONNECT_TIMEOUT": "200", "PERSISTENCE_POOL_TIMEOUT": "200"}
    with hanging(own_server):
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=patient)
    assert result.returncode == 3
    assert result.stderr.startswith("error: cannot connect")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_the_event_loop_goes_on_while_the_server_hangs(own_server: OwnServer) -> None:
    """The loop itself lets the server go on, so the check is only well if it did not hold the loop."""
    async with opened("async", own_server.dsn(), health_timeout=IN_TIME) as (_, check):
        assert (await in_time(check)).ready
        with hanging(own_server):
            running = asyncio.create_task(check())
            for _ in range(20):
                await asyncio.sleep(0.02)
        assert (await running).ready


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_server_that_hangs_when_the_look_is_over(
    colour: str, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pool asks when it gets the connection back has no bound, so nothing may be left to ask."""
    monkeypatch.setattr("persistence.health._SCHEMA_KNOWN_FOR", 3600.0)
    monkeypatch.setattr("persistence.backends.postgres.probe._ROOM", ("BEGIN READ ONLY", "SELECT 1 / 0"))
    look = "persistence.backends.postgres.probe._look"
    real = import_module(look.rpartition(".")[0])._look

    async with opened(colour, own_server.dsn()) as (_, check):
        await in_time(check)
        with ExitStack() as standing:

            def and_then_hang(*args: Any) -> Any:
                found = yield from real(*args)
                standing.enter_context(hanging(own_server))
                return found

            monkeypatch.setattr(look, and_then_hang)
            found = await in_time(check)
        assert found.problem is not None
        assert "zero" in found.problem.message


async def test_a_check_while_all_threads_of_the_event_loop_are_busy(dsn: str) -> None:
    """As where nodes of graphs wait for language models in them."""
    async with opened("async", dsn) as (_, check):
        loop, over = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, over.wait)
        try:
            assert (await in_time(check)).ready
        finally:
            over.set()
        await busy


async def test_a_server_that_may_only_be_read(colour: str, postgres_dsn: str) -> None:
    async with opened(colour, postgres_dsn) as (_, check):
        assert (await in_time(check)).ready
        with psycopg.connect(postgres_dsn, autocommit=True) as conn:
            (name,) = conn.execute("SELECT quote_ident(current_database())").fetchone() or ("",)
            conn.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
            kill_others(conn)
        found = await in_time(check)
        assert found.connected
        assert found.read_ms is not None
        assert found.write_ms is None
        assert found.problem is not None
        assert "can only be read" in found.problem.message


async def test_a_server_without_room_for_a_file(colour: str, postgres_dsn: str) -> None:
    """As on a full disk: the row of the canary is written again in its place, and new rows have none."""
    async with opened(colour, postgres_dsn + "&pool_max=1") as (_, check):
        assert (await in_time(check)).ready
        with psycopg.connect(postgres_dsn, autocommit=True) as conn:
            (name,) = conn.execute("SELECT quote_ident(current_database())").fetchone() or ("",)
            conn.execute(f"ALTER DATABASE {name} SET temp_file_limit = 0".encode())
            kill_others(conn)
            found = await in_time(check)
            assert found.problem is not None
            assert "temporary file" in found.problem.message
            assert found.write_ms is not None
            conn.execute(f"ALTER DATABASE {name} RESET temp_file_limit".encode())
            kill_others(conn)
        assert (await in_time(check)).ready


async def test_a_sqlite_file_that_another_process_is_writing(colour: str, tmp_path: Path) -> None:
    async with opened(colour, f"sqlite:///{tmp_path}/x.db", **BOUNDED) as (_, check):
        await until_ready(check)
        with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as conn:
            conn.execute("BEGIN IMMEDIATE")
            found = await in_time(check)
            assert found.problem is not None
            assert "no write was possible" in found.problem.message
            conn.execute("ROLLBACK")
        assert (await until_ready(check)).status == "ok"


async def test_a_sqlite_file_that_is_gone(colour: str, tmp_path: Path) -> None:
    """SQLite itself would go on writing into the file without a name."""
    async with opened(colour, f"sqlite:///{tmp_path}/x.db") as (_, check):
        assert (await in_time(check)).ready
        (tmp_path / "x.db").unlink()
        found = await in_time(check)
        assert found.problem is not None
        assert "removed or replaced" in found.problem.message


FULL = """
import json, resource, sys
import persistence
with persistence.open(sys.argv[1]) as db:
    documents = [db.health(60).to_json()]
    for limit in (0, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        documents.append(db.health(60).to_json())
print(json.dumps(documents))
"""


def test_a_sqlite_file_that_cannot_grow(tmp_path: Path) -> None:
    """As on a full disk; in a process of its own, because the limit is the process's."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    result = subprocess.run(
        [sys.executable, "-c", FULL, f"sqlite:///{tmp_path}/x.db"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    before, full, after = json.loads(result.stdout)
    assert before["ready"]
    assert full["status"] == "unavailable"
    assert "disk" in full["problem"]["message"]
    assert full["read_ms"] is not None
    assert after["status"] == "ok"


async def test_tables_that_are_missing(colour: str, table_dsn: str) -> None:
    async with opened(colour, table_dsn, setup_on_open=False) as (db, check):
        found = await in_time(check)
        assert (found.status, found.connected, found.migrated) == ("unavailable", True, False)
        assert found.problem is not None
        assert (found.problem.code, found.problem.hint) == ("schema", "run: persistence setup")
        if colour == "async":
            await db.setup()
        else:
            await asyncio.to_thread(db.setup)
        found = await in_time(check)
        assert (found.status, found.migrated, found.revision) == ("ok", True, schema.head())


async def test_tables_that_are_lost_are_noticed_at_once(colour: str, postgres_dsn: str) -> None:
    async with opened(colour, postgres_dsn) as (_, check):
        assert (await in_time(check)).ready
        with psycopg.connect(postgres_dsn, autocommit=True) as conn:
            conn.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        found = await in_time(check)
        assert found.status == "unavailable"
        assert found.problem is not None
        assert found.problem.code == "schema"


async def test_drift_is_noticed(colour: str, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The savers can go on without an index, so the canary sees nothing."""
    async with opened(colour, postgres_dsn) as (_, check):
        assert (await in_time(check)).ready
        with psycopg.connect(postgres_dsn, autocommit=True) as conn:
            conn.execute("DROP INDEX checkpoints_thread_id_idx")
        assert (await in_time(check)).ready  # known for a while
        monkeypatch.setattr("persistence.health._SCHEMA_KNOWN_FOR", 0.0)
        found = await in_time(check)
        assert found.migrated is False
        assert "checkpoints_thread_id_idx" in str(found.differences)


async def test_a_pool_without_a_free_connection(postgres_dsn: str) -> None:
    async with opened("async", postgres_dsn + "&pool_max=1") as (db, check):
        async with db._backend.pool.connection():
            found = await in_time(partial(check, 1))
        assert found.problem is not None
        assert "pool_max" in (found.problem.hint or "")
        assert (await in_time(check)).ready


async def test_many_checks_at_once(colour: str, table_dsn: str) -> None:
    async with opened(colour, table_dsn) as (_, check):
        found = await asyncio.gather(*(check() for _ in range(20)))
        assert all(one.ready for one in found), found


async def test_closed_and_switched_off(colour: str) -> None:
    async with opened(colour, "memory://") as (db, check):
        pass
    assert (await check()).status == "closed"
    assert db.figures() == {}
    async with opened(colour, "memory://", enable_checkpointing=False) as (_, check):
        found = await check()
        assert (found.status, found.ready, found.backend) == ("off", True, "off")


def test_no_password_is_shown(own_server: OwnServer) -> None:
    settings = Settings(setup_on_open=False)
    with persistence.open(own_server.dsn("s3cr3t/pa ss"), settings=settings) as db:
        assert "s3cr3t" not in json.dumps(db.health().to_json())
        own_server.stop()
        try:
            assert "s3cr3t" not in json.dumps(db.health(1).to_json())
        finally:
            own_server.start()


async def test_memory_stands_in_until_the_database_answers(
    colour: str, own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"fallback": "memory", "connect_attempts": 1, "connect_backoff": 0.2, "connect_backoff_max": 0.4}
    name = f"while-away-{colour}"
    await asyncio.to_thread(own_server.stop)
    try:
        context = opened(colour, own_server.dsn(), **values)
        db, check = await context.__aenter__()
    finally:
        await asyncio.to_thread(own_server.start)
    graph: Any = counter().compile(checkpointer=db.checkpointer, store=db.store)
    invoke: Any = graph.ainvoke if colour == "async" else partial(asyncio.to_thread, graph.invoke)
    if db.backend == "memory":  # else the database was quicker than this test, which is what is wanted
        assert db.degraded
    deadline = time.monotonic() + 60
    while db.backend == "memory":
        await invoke({"n": 1}, thread(name))
        assert time.monotonic() < deadline, db.degraded
        await asyncio.sleep(0.05)
    found = await until_ready(check)
    assert (found.status, found.backend, found.degraded) == ("ok", "postgresql", None)
    assert db.degraded is None
    # The same compiled graph writes to the database now.
    await invoke({"n": 5}, thread(f"{name}-after"))
    with psycopg.connect(own_server.dsn()) as conn:
        rows = conn.execute("SELECT DISTINCT thread_id FROM checkpoints").fetchall()
    assert (f"{name}-after",) in rows
    await context.__aexit__(None, None, None)
    assert any("is back and serves" in record.getMessage() for record in caplog.records)


async def test_what_was_kept_only_in_memory_is_told(colour: str, own_server: OwnServer) -> None:
    values = {"fallback": "memory", "connect_attempts": 1, "connect_backoff": 30}
    await asyncio.to_thread(own_server.stop)
    try:
        async with opened(colour, own_server.dsn(), **values) as (db, check):
            found = await in_time(check)
            assert (found.status, found.ready, found.backend) == ("degraded", True, "memory")
            assert found.degraded_since is not None
            graph: Any = counter().compile(checkpointer=db.checkpointer, store=db.store)
            for n in range(3):
                await asyncio.to_thread(graph.invoke, {"n": 1}, thread(str(n % 2)))
            assert db.store is not None
            await db.store.aput(("a",), "k", {"v": 1})
            assert (await db.store.aget(("a",), "k")).value == {"v": 1}
            assert (await in_time(check)).memory_only_threads == 2
    finally:
        await asyncio.to_thread(own_server.start)
