"""Setup: from nothing, again, from what older versions left, and what it refuses."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.store.postgres import PostgresStore
from psycopg.rows import dict_row

from persistence import schema
from persistence.backends.postgres.tables import PostgresTables
from persistence.errors import ConnectError, SchemaError
from persistence.registry import provider_for
from persistence.settings import Settings
from tests.schema.conftest import Place


def test_an_empty_database_gets_all_tables_and_a_second_setup_changes_nothing(place: Place) -> None:
    report = schema.setup(place.provider)
    assert report.revision == schema.head()
    assert "table checkpoints is missing" in [str(change) for change in report.changes]
    assert schema.check(place.provider) == []
    assert schema.setup(place.provider) == schema.SetupReport((), schema.head())


def test_the_configured_schema_holds_everything_and_public_nothing(postgres_schema_place: Place) -> None:
    schema.setup(postgres_schema_place.provider)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    assert postgres_schema_place.run(tables) == [(16,)]
    elsewhere = f"{tables} AND schemaname = 'public'"
    assert postgres_schema_place.run(elsewhere) == [(0,)]


def test_a_database_in_memory_is_the_one_that_is_opened() -> None:
    provider = provider_for("sqlite://", Settings())
    try:
        backend = provider.open()
        try:
            schema.setup(provider)
            assert schema.check(provider) == []
        finally:
            backend.close(5)
    finally:
        provider.database.close()  # type: ignore[attr-defined]


def test_a_backend_without_tables_has_nothing_to_set_up() -> None:
    provider = provider_for("memory://", Settings())
    assert schema.setup(provider) == schema.SetupReport((), None)
    assert schema.check(provider) == []


def test_keyword_dsn(postgres_dsn: str) -> None:
    keywords = psycopg.conninfo.make_conninfo(postgres_dsn)
    provider = provider_for(keywords, Settings())
    schema.setup(provider)
    assert schema.current(provider) == schema.head()


def test_setup_that_has_nothing_to_do_loads_no_schema_library(place: Place) -> None:
    schema.setup(place.provider)
    script = """
import sys
from persistence import schema
from persistence.backends.postgres.tables import PostgresTables
from persistence.registry import provider_for
from persistence.settings import Settings
provider = provider_for(sys.argv[1], Settings(db_schema=sys.argv[2] or None))
print(schema.setup(provider).changes, [m for m in ("alembic", "sqlalchemy") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, place.dsn, place.schema or ""],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "() []"


def test_the_log_has_one_line_of_ours_and_none_of_alembic(
    sqlite_place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        schema.setup(sqlite_place.provider)
    names = [record.name for record in caplog.records if record.levelno >= logging.INFO]
    assert names == ["persistence.schema"]
    assert sqlite_place.provider.dsn.masked in caplog.text


# What others made.


def test_an_official_sqlite_database_keeps_its_rows_and_gets_ours(sqlite_place: Place) -> None:
    assert sqlite_place.path is not None
    with closing(sqlite3.connect(sqlite_place.path, check_same_thread=False)) as connection:
        saver = SqliteSaver(connection)
        config = saver.put(
            {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}, empty_checkpoint(), {}, {}
        )
        before = saver.get_tuple(config)
    assert {d.table for d in schema.check(sqlite_place.provider)} == {
        "store",
        "store_migrations",
        "persistence_alembic_version",
    }
    schema.setup(sqlite_place.provider)
    with closing(sqlite3.connect(sqlite_place.path, check_same_thread=False)) as connection:
        assert SqliteSaver(connection).get_tuple(config) == before


def test_an_sqlite_database_from_before_task_path_gets_the_column(sqlite_place: Place) -> None:
    # As checkpoint-sqlite 1.x made it.
    sqlite_place.run(
        "CREATE TABLE checkpoints (thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '',"
        " checkpoint_id TEXT NOT NULL, parent_checkpoint_id TEXT, type TEXT, checkpoint BLOB, metadata BLOB,"
        " PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id))",
        "CREATE TABLE writes (thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '',"
        " checkpoint_id TEXT NOT NULL, task_id TEXT NOT NULL, idx INTEGER NOT NULL, channel TEXT NOT NULL,"
        " type TEXT, value BLOB, PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, task_id, idx))",
        "INSERT INTO writes VALUES ('t', '', 'c', 'k', 0, 'a', 'null', x'')",
    )
    assert "table writes has no column task_path" in map(str, schema.check(sqlite_place.provider))
    schema.setup(sqlite_place.provider)
    assert sqlite_place.run("SELECT thread_id, task_path FROM writes") == [("t", "")]
    assert schema.check(sqlite_place.provider) == []


def test_a_store_setup_that_died_between_step_and_record_is_finished(sqlite_place: Place) -> None:
    """The official setup stops for ever at ``duplicate column name`` then."""
    schema.setup(sqlite_place.provider)
    sqlite_place.run("DELETE FROM store_migrations WHERE v >= 2", "DROP INDEX idx_store_expires_at")
    assert [d.mend for d in schema.check(sqlite_place.provider)] == [schema.SETUP] * 2
    schema.setup(sqlite_place.provider)
    assert sqlite_place.run("SELECT max(v) FROM store_migrations") == [(4,)]
    assert schema.check(sqlite_place.provider) == []


@pytest.mark.parametrize("crashed", [False, True], ids=["recorded", "died before the record"])
def test_an_official_postgres_database_of_any_age_is_brought_up(postgres_place: Place, crashed: bool) -> None:
    """``crashed``: one more migration ran than is on record."""
    migrations, newest = PostgresSaver.MIGRATIONS, len(PostgresSaver.MIGRATIONS) - 1
    for recorded in range(newest + 1 if crashed else newest + 2):
        postgres_place.run("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        with psycopg.connect(postgres_place.dsn, autocommit=True, row_factory=dict_row) as connection:
            for v, statement in enumerate(migrations[:recorded]):
                connection.execute(statement)
                connection.execute("INSERT INTO checkpoint_migrations (v) VALUES (%s)", (v,))
            if crashed:
                connection.execute(migrations[recorded])
        schema.setup(postgres_place.provider)
        assert schema.check(postgres_place.provider) == [], recorded
        record = "SELECT max(v), count(*) FROM checkpoint_migrations"
        assert postgres_place.run(record) == [(newest, newest + 1)], recorded
    with psycopg.connect(postgres_place.dsn, autocommit=True, row_factory=dict_row) as connection:
        PostgresSaver(connection).setup()
        PostgresStore(connection).setup()
        saved = PostgresSaver(connection).put(
            {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}, empty_checkpoint(), {}, {}
        )
        assert PostgresSaver(connection).get_tuple(saved) is not None


def test_a_database_newer_than_this_version_is_refused_and_left_alone(place: Place) -> None:
    schema.setup(place.provider)
    place.run("UPDATE {}persistence_alembic_version SET version_num = '9001'", "DROP TABLE {}store")
    for act in (schema.setup, schema.check, schema.require, schema.upgrade):
        with pytest.raises(SchemaError, match=rf"older than the database.*9001.*up to {schema.head()}"):
            act(place.provider)
    with place.provider.tables() as tables:
        assert "store" not in tables.observed()


# What setup refuses.


def test_a_file_that_is_not_there_is_not_made_by_looking(sqlite_place: Place) -> None:
    assert sqlite_place.path is not None
    with pytest.raises(SchemaError, match=r"table checkpoints is missing.*`persistence setup`"):
        schema.require(sqlite_place.provider)
    assert schema.current(sqlite_place.provider) is None
    assert not sqlite_place.path.exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for act in (schema.check, schema.setup, schema.upgrade):
        with pytest.raises(ConnectError, match="folder does not exist"):
            act(Place(f"sqlite:///{tmp_path}/none/chat.db").provider)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database(sqlite_place: Place) -> None:
    assert sqlite_place.path is not None
    sqlite_place.path.write_text("no database, but long enough that SQLite looks at its head" * 20)
    with pytest.raises((ConnectError, SchemaError), match=r"not a SQLite database|not a database"):
        schema.setup(sqlite_place.provider)


def test_a_locked_file_is_given_up_in_time(sqlite_place: Place) -> None:
    assert sqlite_place.path is not None
    sqlite_place.run("PRAGMA journal_mode = WAL", "CREATE TABLE mine (x)")
    provider = provider_for(f"{sqlite_place.dsn}?busy_timeout=0.2", Settings())
    with closing(sqlite3.connect(sqlite_place.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SchemaError, match="another process is writing"):
            schema.setup(provider)
    schema.setup(provider)


READ_ONLY = """
import sys
from persistence import schema
from persistence.backends.postgres.tables import PostgresTables
from persistence.errors import PersistenceError
from persistence.registry import provider_for
from persistence.settings import Settings
provider = provider_for(sys.argv[1], Settings())
print([str(d) for d in schema.check(provider)])
try:
    print(schema.setup(provider).changes)
except PersistenceError as error:
    print(type(error).__name__, error)
"""


def _without_rights(folder: Path, dsn: str) -> list[str]:
    """Run in a process for which file modes count, also where root runs the tests."""
    import os

    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-c", READ_ONLY, dsn],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("folder_too", [False, True], ids=["file", "file and folder"])
def test_a_read_only_file_that_is_complete_is_checked_and_set_up(
    sqlite_place: Place, tmp_path: Path, folder_too: bool
) -> None:
    assert sqlite_place.path is not None
    schema.setup(sqlite_place.provider)
    sqlite_place.path.chmod(0o444)
    tmp_path.chmod(0o555 if folder_too else 0o755)
    try:
        assert _without_rights(Path("/"), sqlite_place.dsn) == ["[]", "()"]
    finally:
        tmp_path.chmod(0o755)


def test_a_read_only_file_that_is_not_complete_is_a_clear_error(sqlite_place: Place) -> None:
    assert sqlite_place.path is not None
    schema.setup(sqlite_place.provider)
    sqlite_place.run("DROP TABLE writes")
    sqlite_place.path.chmod(0o444)
    found, error = _without_rights(Path("/"), sqlite_place.dsn)
    assert found == "['table writes is missing']"
    assert error.startswith("SchemaError") and "may only be read" in error and "`persistence setup`" in error


_COMPRESSION = """
SELECT c.relname::text, a.attcompression::text FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE a.attname = 'blob' AND c.relname IN ('checkpoint_blobs', 'checkpoint_writes') ORDER BY 1
"""


def test_large_values_are_compressed_by_lz4_where_the_server_has_it(postgres_schema_place: Place) -> None:
    """The server from the wheel has not: setup leaves its columns alone, and pglz shows the statements."""
    place = postgres_schema_place
    schema.setup(place.provider)
    has_lz4 = place.run(
        "SELECT 'lz4' = ANY (enumvals) FROM pg_settings WHERE name = 'default_toast_compression'"
    )
    expected = "l" if has_lz4 == [(True,)] else ""
    assert place.run(_COMPRESSION) == [("checkpoint_blobs", expected), ("checkpoint_writes", expected)]
    with PostgresTables(place.provider) as tables:
        tables.set_compression("pglz")
    assert place.run(_COMPRESSION) == [("checkpoint_blobs", "p"), ("checkpoint_writes", "p")]
    assert schema.check(place.provider) == []


def test_partitioned_tables_are_refused_before_anything_is_made_and_can_be_completed_by_hand(
    postgres_place: Place,
) -> None:
    postgres_place.run("""
        CREATE TABLE checkpoints (
            thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL DEFAULT '', checkpoint_id TEXT NOT NULL,
            parent_checkpoint_id TEXT, type TEXT, checkpoint JSONB NOT NULL,
            metadata JSONB NOT NULL DEFAULT jsonb_build_object(),
            PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id)
        ) PARTITION BY HASH (thread_id)""")
    for repair in (False, True):
        with pytest.raises(SchemaError, match="cannot be run on partitioned tables: checkpoints in") as error:
            schema.setup(postgres_place.provider, repair=repair)
        assert "CONCURRENTLY" in (error.value.hint or "")
    tables = (
        "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace"
    )
    assert postgres_place.run(tables) == [("checkpoints",)]
    with PostgresTables(postgres_place.provider) as made:
        by_hand = made.langgraph_sql().replace("CONCURRENTLY", "")
    with psycopg.connect(postgres_place.dsn, autocommit=True) as conn:
        conn.execute(by_hand.encode())
    schema.setup(postgres_place.provider)
    assert schema.check(postgres_place.provider) == []
