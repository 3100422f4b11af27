"""The drift check: what is declared is what upstream makes, and every difference is found and mended."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.store.postgres import PostgresStore
from langgraph.store.sqlite import SqliteStore
from psycopg.rows import dict_row

from persistence import schema
from persistence.errors import SchemaError
from tests.schema.conftest import Place

# What is declared.


def test_the_declared_sqlite_tables_are_those_that_the_official_packages_make(sqlite_place: Place) -> None:
    assert sqlite_place.path is not None
    with closing(sqlite3.connect(sqlite_place.path, check_same_thread=False)) as connection:
        SqliteSaver(connection).setup()
        SqliteStore(connection).setup()
        connection.commit()
    with sqlite_place.provider.tables() as tables:
        assert tables.observed() == tables.required
        assert tables.langgraph_pending() == {}


def test_the_declared_postgres_tables_are_those_that_the_official_packages_make(
    postgres_place: Place,
) -> None:
    with psycopg.connect(postgres_place.dsn, autocommit=True, row_factory=dict_row) as connection:
        PostgresSaver(connection).setup()
        PostgresStore(connection).setup()
    with postgres_place.provider.tables() as tables:
        assert tables.observed() == tables.required
        assert tables.langgraph_pending() == {}


def test_the_declared_own_tables_are_those_that_the_migrations_make(place: Place) -> None:
    schema.setup(place.provider)
    with place.provider.tables() as tables:
        own = {name: shape for name, shape in tables.observed().items() if name.startswith("persistence_")}
    del own["persistence_alembic_version"]
    assert own == schema.OWN_TABLES


# What differs.

BOTH = [
    ("DROP TABLE {}store", "table store is missing"),
    ("ALTER TABLE {}store DROP COLUMN ttl_minutes", "table store has no column ttl_minutes"),
    ("DROP INDEX {}store_prefix_idx", "table store has no valid index store_prefix_idx"),
    ("DROP INDEX {}idx_store_expires_at", "table store has no valid index idx_store_expires_at"),
]
POSTGRES = [
    ("DROP TABLE {}checkpoint_blobs", "table checkpoint_blobs is missing"),
    ("ALTER TABLE {}checkpoint_writes DROP COLUMN task_path", "no column task_path"),
    ("DROP INDEX {}checkpoints_thread_id_idx", "no valid index checkpoints_thread_id_idx"),
]


def _is_found_and_repaired(place: Place, statement: str, detail: str) -> None:
    schema.setup(place.provider)
    place.run(statement)
    found = schema.check(place.provider)
    assert [str(difference) for difference in found if detail in str(difference)]
    assert {difference.mend for difference in found} == {schema.REPAIR}
    for act in (schema.setup, schema.require):
        with pytest.raises(SchemaError, match=f"{detail}.*run `persistence setup --repair`"):
            act(place.provider)
    report = schema.setup(place.provider, repair=True)
    assert list(report.changes) == found
    assert schema.check(place.provider) == []


@pytest.mark.parametrize(("statement", "detail"), BOTH)
def test_what_was_dropped_is_found_and_repaired(place: Place, statement: str, detail: str) -> None:
    _is_found_and_repaired(place, statement, detail)


@pytest.mark.parametrize(("statement", "detail"), POSTGRES)
def test_what_was_dropped_on_postgres_is_found_and_repaired(
    either_postgres: Place, statement: str, detail: str
) -> None:
    _is_found_and_repaired(either_postgres, statement, detail)


def test_a_lost_table_is_not_replaced_by_an_empty_one_without_being_told_to(postgres_place: Place) -> None:
    schema.setup(postgres_place.provider)
    postgres_place.run("DROP TABLE checkpoint_blobs")
    with pytest.raises(SchemaError, match="restore a backup"):
        schema.setup(postgres_place.provider)
    assert postgres_place.run("SELECT to_regclass('checkpoint_blobs')") == [(None,)]


def test_a_table_of_another_application_cannot_be_mended(place: Place) -> None:
    if place.schema:
        place.run(f'CREATE SCHEMA "{place.schema.replace(chr(34), chr(34) * 2)}"')
    place.run("CREATE TABLE {}checkpoints (thread_id TEXT, level INTEGER)")
    with pytest.raises(SchemaError, match="table checkpoints has no column checkpoint"):
        schema.setup(place.provider)
    with pytest.raises(SchemaError, match=r"not made by LangGraph|could not be set up"):
        schema.setup(place.provider, repair=True)
    assert place.run("SELECT level FROM {}checkpoints") == []


def test_another_primary_key_is_found_and_no_command_is_named(postgres_place: Place) -> None:
    schema.setup(postgres_place.provider)
    postgres_place.run(
        "ALTER TABLE checkpoint_writes DROP CONSTRAINT checkpoint_writes_pkey",
        "ALTER TABLE checkpoint_writes ADD PRIMARY KEY (thread_id, checkpoint_id, task_id, idx)",
    )
    [difference] = schema.check(postgres_place.provider)
    assert difference.kind == "primary key" and difference.mend is None
    assert "has primary key (thread_id, checkpoint_id, task_id, idx), not (thread_id, checkpoint_ns," in str(
        difference
    )
    with pytest.raises(SchemaError, match="no command mends this"):
        schema.require(postgres_place.provider)


def _leave_an_invalid_index(place: Place, index: str, table: str) -> None:
    """As a cancelled CREATE INDEX CONCURRENTLY does: somebody's old snapshot holds it up until it is."""
    place.run(f"DROP INDEX {index}")
    with psycopg.connect(place.dsn) as reader, psycopg.connect(place.dsn, autocommit=True) as builder:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("SELECT 1 FROM pg_class LIMIT 1")
        builder.execute("SET statement_timeout = '300ms'")
        name = index.replace("{}", "")
        with pytest.raises(psycopg.errors.QueryCanceled):
            builder.execute(f"CREATE INDEX CONCURRENTLY {name} ON {table} (thread_id)".encode())


def test_an_index_left_invalid_is_found_and_repaired(postgres_place: Place) -> None:
    schema.setup(postgres_place.provider)
    _leave_an_invalid_index(postgres_place, "checkpoints_thread_id_idx", "checkpoints")
    [difference] = schema.check(postgres_place.provider)
    assert difference.kind == "index" and difference.mend == schema.REPAIR
    schema.setup(postgres_place.provider, repair=True)
    assert schema.check(postgres_place.provider) == []


def test_an_index_left_invalid_by_a_killed_setup_is_finished_by_the_next(postgres_place: Place) -> None:
    schema.setup(postgres_place.provider)
    _leave_an_invalid_index(postgres_place, "checkpoint_writes_thread_id_idx", "checkpoint_writes")
    postgres_place.run("DELETE FROM checkpoint_migrations WHERE v >= 8")
    schema.setup(postgres_place.provider)
    assert schema.check(postgres_place.provider) == []


def test_an_index_of_the_same_name_in_another_schema_does_not_count(
    postgres_place: Place, postgres_schema_place: Place
) -> None:
    schema.setup(postgres_place.provider)
    assert "table checkpoints is missing" in map(str, schema.check(postgres_schema_place.provider))
    schema.setup(postgres_schema_place.provider)
    postgres_schema_place.run("DROP INDEX {}checkpoints_thread_id_idx")
    assert len(schema.check(postgres_schema_place.provider)) == 1
    assert schema.check(postgres_place.provider) == []


def test_a_schema_earlier_on_the_search_path_is_the_one_that_counts(postgres_place: Place) -> None:
    schema.setup(postgres_place.provider)
    postgres_place.run("CREATE SCHEMA first", "CREATE TABLE first.checkpoints (mine int)")
    database = postgres_place.run("SELECT current_database()")[0][0]
    postgres_place.run(f"ALTER DATABASE {database} SET search_path = first, public")
    differences = schema.check(postgres_place.provider)
    assert {difference.table for difference in differences} == {"checkpoints"}


def test_our_own_table_dropped_by_hand_names_the_way_back(place: Place) -> None:
    schema.setup(place.provider)
    place.run("DROP TABLE {}persistence_transfers")
    for repair in (False, True):
        with pytest.raises(
            SchemaError, match="`persistence schema downgrade base` and `persistence schema upgrade`"
        ):
            schema.setup(place.provider, repair=repair)
    schema.downgrade(place.provider, "base")
    schema.upgrade(place.provider)
    assert schema.check(place.provider) == []


def test_more_than_is_needed_is_no_difference(place: Place) -> None:
    schema.setup(place.provider)
    place.run(
        "ALTER TABLE {}checkpoints ADD COLUMN mine TEXT",
        "CREATE TABLE {}persistence_mine (x INTEGER)",
        "CREATE TABLE {}anything (x INTEGER)",
    )
    assert schema.check(place.provider) == []
    with suppress(SchemaError):
        assert schema.setup(place.provider).changes == ()
