"""What a call costs grows with what it deletes, copies or finds, not with all that is stored."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

import persistence
from persistence import Dsn
from tests.ops.conftest import counter, thread

OTHERS = 300
TABLES = {
    "sqlite": ("checkpoints", "writes"),
    "postgres": ("checkpoints", "checkpoint_blobs", "checkpoint_writes"),
}


def fill(dsn: str) -> None:
    """Three threads of a run each."""
    with persistence.open(dsn) as db:
        graph = counter().compile(checkpointer=db.checkpointer)
        for name in "abc":
            for _ in range(3):
                config: Any = {**thread(name), "metadata": {"run_id": f"run {name}"}}
                graph.invoke({"n": 1}, config)


def multiply(columns: Callable[[str], list[str]], execute: Callable[[str], object], backend: str) -> None:
    """Copies of thread ``a`` that nobody asks for."""
    execute(
        "CREATE TABLE n AS WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r "
        f"WHERE i < {OTHERS}) SELECT i FROM r"
    )
    for table in TABLES[backend]:
        rest = ", ".join(name for name in columns(table) if name != "thread_id")
        execute(
            f"INSERT INTO {table} (thread_id, {rest}) "
            f"SELECT 'other ' || i, {rest} FROM {table}, n WHERE thread_id = 'a'"
        )
    execute("ANALYZE")


def maintain(dsn: str) -> None:
    with persistence.open(dsn) as db:
        assert db.checkpointer is not None
        db.checkpointer.copy_thread("a", "d")
        db.checkpointer.prune(["a"])
        db.checkpointer.prune(["b"], strategy="delete")
        db.checkpointer.delete_thread("c")
        assert [found.config["configurable"]["thread_id"] for found in db.checkpointer.list(thread("a"))] == [
            "a"
        ]


def test_sqlite_scans_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"
    fill(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as conn:
        multiply(
            lambda table: [row[1] for row in conn.execute(f"PRAGMA table_info({table})")],
            conn.execute,
            "sqlite",
        )
        conn.commit()
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*arguments: object, **options: object) -> sqlite3.Connection:
        conn = connect(*arguments, **options)  # type: ignore[call-overload]
        conn.set_trace_callback(statements.append)
        return conn  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        maintain(f"sqlite:///{path}")
    plans = []
    with closing(sqlite3.connect(path)) as conn:
        for statement in statements:
            verb = statement.split(maxsplit=1)[0]
            if verb in {"SELECT", "INSERT", "UPDATE", "DELETE"} and "persistence" not in statement:
                plans += [row[3] for row in conn.execute(f"EXPLAIN QUERY PLAN {statement}")]
    assert any("SEARCH" in plan for plan in plans)
    assert [plan for plan in plans if plan.startswith("SCAN") and plan.split()[1] in TABLES["sqlite"]] == []


@pytest.fixture
def full(postgres_dsn: str) -> Iterator[psycopg.Connection]:
    fill(postgres_dsn)
    with psycopg.connect(Dsn.parse(postgres_dsn).conninfo, autocommit=True) as conn:
        columns = "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
        multiply(
            lambda table: [row[0] for row in conn.execute(columns, (table,))],
            lambda statement: conn.execute(statement.encode()),
            "postgres",
        )
        yield conn


def rows_read(conn: psycopg.Connection) -> int:
    """So far; what a process has counted is known when it ends, so the others must have."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = %s"
    until = time.monotonic() + 60
    while conn.execute(others, ("client backend",)).fetchall() != [(1,)]:
        assert time.monotonic() < until
        time.sleep(0.02)
    read = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_user_tables"
    query = f"{read} WHERE relname = ANY(%s)"
    ((number,),) = conn.execute(query, ([*TABLES["postgres"]],)).fetchall()
    return int(number)


def run_apart(dsn: str, *statements: str) -> None:
    """In a process of its own: what these read counts before the next look, not during it."""
    with psycopg.connect(Dsn.parse(dsn).conninfo, autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement.encode())


def test_postgres_scans_no_table(postgres_dsn: str, full: psycopg.Connection) -> None:
    before = rows_read(full)
    maintain(postgres_dsn)
    assert rows_read(full) - before < OTHERS


def test_postgres_filters_by_an_index_where_there_is_one(postgres_dsn: str, full: psycopg.Connection) -> None:
    def find(wanted: dict[str, Any]) -> int:
        before = rows_read(full)
        with persistence.open(postgres_dsn) as db:
            assert db.checkpointer is not None
            found = [found.metadata["run_id"] for found in db.checkpointer.list(None, filter=wanted)]
        assert found == ["run b"] * len(found) and found
        return rows_read(full) - before

    assert find({"run_id": "run b"}) > OTHERS
    index = "CREATE INDEX CONCURRENTLY ON checkpoints USING gin (metadata jsonb_path_ops)"
    run_apart(postgres_dsn, index, "ANALYZE")
    assert find({"run_id": "run b"}) < OTHERS
    assert find({"run_id": "run b", "missing": None}) < OTHERS


def test_postgres_finds_runs_by_an_index_where_there_is_one(
    postgres_dsn: str, full: psycopg.Connection
) -> None:
    def delete(run: str) -> int:
        before = rows_read(full)
        with persistence.open(postgres_dsn) as db:
            assert db.checkpointer is not None
            db.checkpointer.delete_for_runs([run])
        return rows_read(full) - before

    assert delete("run b") > OTHERS
    run_apart(postgres_dsn, "CREATE INDEX CONCURRENTLY ON checkpoints ((metadata ->> 'run_id'))", "ANALYZE")
    assert delete("run c") < OTHERS
