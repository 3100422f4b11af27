"""Opening and closing a database by its DSN: the same code for every backend."""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver

import persistence
from persistence import registry
from persistence.contract import AsyncBackend, Backend, Provider
from persistence.errors import ClosedError, SchemaError, UnsupportedError
from persistence.settings import Settings
from tests.ops.conftest import counter, said, thread


def test_the_same_code_runs_on_every_backend(dsn: str) -> None:
    with persistence.open(dsn) as db:
        graph = counter().compile(checkpointer=db.checkpointer, store=db.store)
        assert graph.invoke({"n": 1}, thread()) == {"n": 2}
        assert graph.get_state(thread()).values == {"n": 2}
        assert isinstance(db.checkpointer, BaseCheckpointSaver)
        assert db.checkpointer is db.checkpointer
        assert db.store is not None
        db.store.put(("users", "1"), "theme", {"dark": True})
        item = db.store.get(("users", "1"), "theme")
        assert item is not None
        assert item.value == {"dark": True}
        assert [found.key for found in db.store.search(("users",))] == ["theme"]
        assert db.store.list_namespaces() == [("users", "1")]
        info = db.ping()
        assert info is not None
        assert info.product in {"SQLite", "PostgreSQL", "memory"}


async def test_the_same_code_runs_on_every_backend_async(dsn: str) -> None:
    async with persistence.aopen(dsn) as db:
        graph = counter().compile(checkpointer=db.checkpointer, store=db.store)
        assert await graph.ainvoke({"n": 1}, thread()) == {"n": 2}
        assert (await graph.aget_state(thread())).values == {"n": 2}
        assert db.store is not None
        await db.store.aput(("users", "1"), "theme", {"dark": True})
        item = await db.store.aget(("users", "1"), "theme")
        assert item is not None
        assert item.value == {"dark": True}
        assert [found.key for found in await db.store.asearch(("users",))] == ["theme"]
        assert await db.store.alist_namespaces() == [("users", "1")]
        assert await db.ping() is not None


async def test_aopen_may_be_awaited(dsn: str) -> None:
    db = await persistence.aopen(dsn)
    await db.close()
    assert db.closed


@pytest.mark.parametrize("table_dsn", ["sqlite", "postgres", "postgres with a schema"], indirect=True)
def test_what_is_durable_is_there_again(table_dsn: str) -> None:
    for expected in (2, 3):
        with persistence.open(table_dsn) as db:
            graph = counter().compile(checkpointer=db.checkpointer)
            state = graph.get_state(thread()).values
            assert graph.invoke({"n": state.get("n", 1)}, thread()) == {"n": expected}


def test_a_closed_handle_refuses_everything(dsn: str) -> None:
    db = persistence.open(dsn)
    saver, store = db.checkpointer, db.store
    assert saver is not None
    assert store is not None
    store.put(("a",), "k", {})
    db.close()
    db.close()
    for use in (
        lambda: db.checkpointer,
        lambda: db.store,
        db.ping,
        db.setup,
        lambda: saver.get_tuple(thread()),
    ):
        with pytest.raises(ClosedError):
            use()
    if not dsn.startswith("memory"):
        with pytest.raises(ClosedError):
            store.get(("a",), "k")


async def test_a_closed_handle_refuses_everything_async(dsn: str) -> None:
    db = await persistence.aopen(dsn)
    saver, store = db.checkpointer, db.store
    assert saver is not None
    assert store is not None
    await store.aput(("a",), "k", {})
    await db.close()
    await db.close()
    for use in (db.ping, db.setup, lambda: saver.aget_tuple(thread())):
        with pytest.raises(ClosedError):
            await use()
    with pytest.raises(ClosedError):
        _ = db.checkpointer
    if not dsn.startswith("memory"):
        with pytest.raises(ClosedError):
            await store.aget(("a",), "k")


def test_many_threads_close_once(dsn: str) -> None:
    db = persistence.open(dsn)
    failures: list[Exception] = []

    def close() -> None:
        try:
            db.close()
        except Exception as error:  # noqa: BLE001 - all are looked at
            failures.append(error)

    threads = [threading.Thread(target=close) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failures == []


def test_nothing_is_left_running(dsn: str) -> None:
    before = set(threading.enumerate())
    with persistence.open(dsn) as db:
        counter().compile(checkpointer=db.checkpointer, store=db.store).invoke({"n": 1}, thread())
    left = [one.name for one in set(threading.enumerate()) - before if one.is_alive()]
    assert [name for name in left if not name.startswith(("asyncio_", "ThreadPoolExecutor"))] == []


def test_without_setup_a_missing_table_names_the_command(table_dsn: str) -> None:
    with persistence.open(table_dsn, settings=Settings(setup_on_open=False)) as db:
        assert db.checkpointer is not None
        assert db.store is not None
        with pytest.raises(SchemaError, match="persistence setup"):
            db.checkpointer.get_tuple(thread())
        with pytest.raises(SchemaError, match="persistence setup"):
            list(db.checkpointer.list(None))
        with pytest.raises(SchemaError, match="persistence setup"):
            db.store.get(("a",), "k")
        db.setup()
        db.setup()
        counter().compile(checkpointer=db.checkpointer).invoke({"n": 1}, thread())
        db.store.put(("a",), "k", {})


async def test_without_setup_a_missing_table_names_the_command_async(table_dsn: str) -> None:
    async with persistence.aopen(table_dsn, settings=Settings(setup_on_open=False)) as db:
        assert db.checkpointer is not None
        assert db.store is not None
        with pytest.raises(SchemaError, match="persistence setup"):
            await db.checkpointer.aget_tuple(thread())
        with pytest.raises(SchemaError, match="persistence setup"):
            await db.store.aget(("a",), "k")
        await db.setup()
        await counter().compile(checkpointer=db.checkpointer).ainvoke({"n": 1}, thread())
        await db.store.aput(("a",), "k", {})


def test_a_failed_setup_closes_what_was_opened(postgres_dsn: str) -> None:
    with psycopg.connect(postgres_dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE checkpoint_migrations (v int PRIMARY KEY)")
        conn.execute("INSERT INTO checkpoint_migrations SELECT generate_series(0, 99)")
        before = threading.active_count()
        with pytest.raises(SchemaError):
            persistence.open(postgres_dsn)
        assert threading.active_count() == before
        deadline = time.monotonic() + 60
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        while (row := conn.execute(others).fetchone()) != (1,) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert row == (1,)


class BodyError(Exception):
    pass


def test_the_bodys_error_is_never_masked_by_the_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: object, timeout: float) -> None:
        raise RuntimeError("close failed")

    monkeypatch.setattr("persistence.backends.memory.provider.MemoryBackend.close", refuse)
    with pytest.raises(BodyError), persistence.open("memory://"):
        raise BodyError
    assert "closing memory:// failed" in said(caplog, logging.ERROR)
    with pytest.raises(RuntimeError, match="close failed"), persistence.open("memory://"):
        pass


async def test_the_bodys_error_is_never_masked_by_the_close_async(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(self: object, timeout: float) -> None:  # noqa: ASYNC109
        raise RuntimeError("close failed")

    monkeypatch.setattr("persistence.backends.memory.provider.AsyncMemoryBackend.close", refuse)
    with pytest.raises(BodyError):
        async with persistence.aopen("memory://"):
            raise BodyError
    assert "closing memory:// failed" in said(caplog, logging.ERROR)


class _Bare(Provider):
    """The least that a third party can write."""

    schemes = ("bare",)

    def open(self) -> Backend:
        return registry.provider_for("memory://", self.settings).open()

    async def aopen(self) -> AsyncBackend:
        return await registry.provider_for("memory://", self.settings).aopen()


def test_a_third_partys_scheme_works_and_has_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    persistence.register(_Bare)
    with persistence.open("bare://user:hunter2@host") as db:
        assert counter().compile(checkpointer=db.checkpointer).invoke({"n": 1}, thread()) == {"n": 2}
        assert db.backend == "bare"
        with pytest.raises(UnsupportedError, match="bare has no store") as caught:
            _ = db.store
        assert "hunter2" not in f"{caught.value}{db!r}{db.dsn}"


def test_the_backend_of_the_documentation_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    page = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    [example] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(example, {"__name__": "example"})  # noqa: S102 - our own page
    expected = [line.partition("  # ")[2] for line in example.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_store_is_opened_only_when_asked_for(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    from persistence.backends.postgres import store

    monkeypatch.setattr(store.PostgresStore, "__init__", lambda self, pool: made.append(pool))
    monkeypatch.setattr(store.PostgresStore, "stop_ttl_sweeper", lambda self, timeout: True)
    monkeypatch.setattr(store.PostgresStore, "__del__", lambda self: None)
    with persistence.open(postgres_dsn) as db:
        assert made == []
        assert db.store is db.store
        assert len(made) == 1


def test_closing_is_bounded_while_a_connection_is_in_use(postgres_dsn: str) -> None:
    db = persistence.open(postgres_dsn, settings=Settings(close_timeout=1))
    pool = db._backend.pool  # type: ignore[union-attr]
    with pool.connection() as conn:
        begin = time.monotonic()
        db.close()
        assert time.monotonic() - begin < 30  # else it would wait for this very thread
        assert conn.execute("SELECT 1 AS one").fetchone() == {"one": 1}  # its user may finish
