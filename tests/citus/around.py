"""What stands around the savers, on distributed tables: setup, health, transfers in and out, undo, the store.

`make citus` runs it, as ``savers.py``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from psycopg import sql

import persistence
from examples.trip_planner import build
from persistence import transfer
from persistence.backends.postgres import steps
from persistence.backends.postgres.transfer_source import PostgresSource
from persistence.registry import provider_for
from persistence.rules import Key
from persistence.testing.subject import at, bare
from tests.citus.conftest import TABLES
from tests.forked import Commands
from tests.support import clean_environment, make_chat, query_form

THREADS = [f"t{number}" for number in range(20)]
Run = Callable[..., str]


@pytest.fixture
def dsn(cluster: str) -> str:
    """The tables, empty."""
    with psycopg.connect(cluster, autocommit=True) as conn:
        own = conn.execute(
            r"SELECT relname FROM pg_class WHERE relname LIKE 'persistence\_%' AND relkind = 'r'"
            " AND relname <> 'persistence_alembic_version'"
        )
        tables = (*TABLES, "store", *(name for (name,) in own))
        conn.execute(f"TRUNCATE {', '.join(tables)}".encode())
    return "postgresql://" + query_form(cluster)


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """Two conversations in a file of the official saver's."""
    return make_chat(tmp_path)


@pytest.fixture
def run(tmp_path: Path, commands: Commands) -> Run:
    """Run a command that succeeds; its output."""

    def run(*arguments: str) -> str:
        done = commands.run(*arguments, cwd=tmp_path, env=clean_environment())
        assert done.returncode == 0, done
        return done.stdout

    return run


def talk(saver: Any, thread: str) -> None:
    build(saver).invoke({"messages": [HumanMessage("Hello")]}, {"configurable": {"thread_id": thread}})


def put(saver: Any, id_: str, parent: str | None = None) -> None:
    """A checkpoint with a write in each of the threads."""
    for thread in THREADS:
        values, versions = {"x": [thread, id_]}, {"x": id_}
        config = saver.put(at(thread, parent), bare(id_, values, versions), {"run_id": id_}, versions)
        saver.put_writes(config, [("x", id_)], "task")


def test_tables_are_spread(cluster: str, dsn: str) -> None:
    """Without this the others would prove nothing."""
    with persistence.open(dsn) as db:
        put(db.checkpointer, "1")
    with psycopg.connect(cluster) as conn:
        statement = "SELECT result FROM run_command_on_shards('checkpoints', 'SELECT count(*) FROM %s')"
        assert [count != "0" for (count,) in conn.execute(statement)].count(True) > 1


def test_setup_and_schema_commands(dsn: str, run: Run) -> None:
    run("setup", "--dsn", dsn)
    run("setup", "--repair", "--dsn", dsn)
    run("schema", "check", "--dsn", dsn)
    assert "status ok" in " ".join(run("status", "--dsn", dsn, "--ready").split())


def test_a_statement_for_one_thread_needs_one_machine(cluster: str, dsn: str) -> None:
    """One that is away costs only its own threads."""
    statement, params = steps.get(Key("t1", "", None))
    with psycopg.connect(cluster, cursor_factory=psycopg.ClientCursor) as conn:
        plan = conn.execute(f"EXPLAIN {statement}".encode(), params).fetchall()
    assert "Task Count: 1" in "\n".join(line for (line,) in plan)


def test_operations_on_threads_of_several_machines(dsn: str) -> None:
    with persistence.open(dsn) as db:
        saver = db.checkpointer
        assert saver is not None
        put(saver, "1")
        put(saver, "2", "1")
        assert len(list(saver.list(None))) == 2 * len(THREADS)
        assert len(list(saver.list(None, filter={"run_id": "2"}))) == len(THREADS)
        saver.prune(THREADS)
        assert len(list(saver.list(None))) == len(THREADS)
        for thread in THREADS:
            saver.copy_thread(thread, f"copy {thread}")
        saver.delete_thread("t0")
        saver.delete_for_runs(["2"])
        assert list(saver.list(None)) == []


async def test_many_tasks_write_to_several_machines_at_once(dsn: str) -> None:
    """Batches of several threads commit in two phases."""
    async with persistence.aopen(dsn) as db:
        saver = db.checkpointer
        assert saver is not None

        async def write(number: int) -> None:
            for step in range(5):
                checkpoint = bare(str(step), {"x": [number, step]}, {"x": str(step)})
                parent = str(step - 1) if step else None
                await saver.aput(at(f"t{number}", parent), checkpoint, {}, {"x": str(step)})

        await asyncio.gather(*(write(number) for number in range(60)))
        for number in range(60):
            found = await saver.aget_tuple(at(f"t{number}"))
            assert found is not None
            assert found.checkpoint["channel_values"] == {"x": [number, 4]}


def test_transfers_in_and_out_and_undo(dsn: str, chat: Path, tmp_path: Path, run: Run) -> None:
    source, back = f"sqlite:///{chat}", f"sqlite:///{tmp_path / 'back.db'}"
    run("migrate", source, dsn)
    run("verify", source, dsn)
    run("migrate", dsn, back)
    run("verify", source, back)
    run("export", dsn, "archive")
    run("verify", "archive", dsn)
    assert "9" in run("inspect", dsn)
    (done,) = transfer.runs(dsn)
    run("undo", "--dsn", dsn, done.run_id)
    run("import", "archive", dsn)
    run("verify", "archive", source)


def test_following_a_file_and_undo(dsn: str, chat: Path) -> None:
    stop, rounds = threading.Event(), 0

    def told(found: Any) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            with SqliteSaver.from_conn_string(str(chat)) as saver:
                talk(saver, "bob")
                talk(saver, "carol")
                saver.delete_thread("alice")
        else:
            stop.set()

    transfer.follow(chat, dsn, interval=0.1, stop=stop, told=told)
    assert transfer.verify(chat, dsn).differences == []
    (done,) = transfer.runs(dsn)
    transfer.undo(done.run_id, dsn)
    with persistence.open(dsn) as db:
        assert list(db.checkpointer.list(None)) == []  # type: ignore[union-attr]


def test_workers_do_not_end_a_slow_transfer(cluster: str, dsn: str) -> None:
    """What the source's transaction sets against an idle limit, it sets on the workers too."""
    with persistence.open(dsn) as db:
        put(db.checkpointer, "1")
    with psycopg.connect(cluster, autocommit=True) as conn:
        limit = sql.SQL("ALTER DATABASE {} SET idle_in_transaction_session_timeout = {}")
        database = sql.Identifier(conn.info.dbname)
        conn.execute(limit.format(database, sql.Literal("200ms")))  # on the workers, too
        try:
            with PostgresSource(provider_for(dsn)) as source:
                assert source.count() == len(THREADS)
                threading.Event().wait(1)
                assert source.count() == len(THREADS)
        finally:
            conn.execute(limit.format(database, sql.Literal("0")))


async def test_store_stays_on_the_coordinator(dsn: str) -> None:
    async with persistence.aopen(dsn) as db:
        assert db.store is not None
        await asyncio.gather(*(db.store.aput(("a",), f"{n}", {"n": n}, ttl=5) for n in range(20)))
        found = await asyncio.gather(*(db.store.aget(("a",), f"{n}") for n in range(20)))
        assert [item.value["n"] for item in found if item] == list(range(20))
        assert [item.key for item in await db.store.asearch(("a",), filter={"n": 5})] == ["5"]
