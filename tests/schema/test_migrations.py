"""Our own migrations: up, down, history, and the SQL that an administrator runs by hand."""

from __future__ import annotations

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from persistence import schema
from persistence.errors import SchemaError
from tests.schema.conftest import Place


def test_up_down_history_and_current(place: Place) -> None:
    provider = place.provider
    assert schema.current(provider) is None
    schema.setup(provider)
    assert schema.current(provider) == schema.head()
    assert all(revision.applied for revision in schema.history(provider))
    assert schema.downgrade(provider, "base") is None
    assert [revision.applied for revision in schema.history(provider)] == [False] * len(
        schema.history(provider)
    )
    assert [difference.mend for difference in schema.check(provider)] == [schema.UPGRADE]
    assert schema.upgrade(provider) == schema.head()
    assert schema.upgrade(provider) == schema.head()
    assert schema.check(provider) == []


def test_going_down_leaves_langgraphs_tables_alone(place: Place) -> None:
    schema.setup(place.provider)
    place.run("INSERT INTO {}store (prefix, key, value) VALUES ('p', 'k', '1')")
    schema.downgrade(place.provider, "base")
    assert len(place.run("SELECT * FROM {}store")) == 1
    with place.provider.tables() as tables:
        assert [t for t in tables.observed() if t.startswith("persistence_")] == [
            "persistence_alembic_version"
        ]


def test_down_is_never_up_and_up_never_down(place: Place) -> None:
    schema.setup(place.provider)
    assert schema.upgrade(place.provider, "base") == schema.head()
    schema.downgrade(place.provider, "base")
    assert schema.downgrade(place.provider, "head") is None


def test_an_upgrade_in_a_schema_that_is_not_there_names_setup(postgres_schema_place: Place) -> None:
    with pytest.raises(SchemaError, match=r"does not exist.*`persistence setup`"):
        schema.upgrade(postgres_schema_place.provider)


def test_an_unknown_revision_names_the_known_ones(place: Place) -> None:
    with pytest.raises(SchemaError, match=rf"no revision '4711'.*base, 0001, .*{schema.head()}, head"):
        schema.upgrade(place.provider, "4711")


def test_revisions_are_what_the_file_names_say() -> None:
    revisions = sorted(
        path.stem.split("_")[0] for path in (schema.migrations_folder() / "versions").glob("*.py")
    )
    assert revisions[-1] == schema.head()
    assert revisions == [f"{number:04d}" for number in range(1, len(revisions) + 1)]


def test_sql_needs_no_server() -> None:
    place = Place("postgresql://nobody:hunter2@127.0.0.1:1/none")
    script = schema.sql(place.provider)
    assert "CREATE INDEX CONCURRENTLY" in script and "persistence_transfers" in script
    assert "hunter2" not in script


def test_sql_from_the_present_revision_is_only_what_is_missing(place: Place) -> None:
    assert "CREATE" not in schema.sql(place.provider, schema.head(), "head")
    down = schema.sql(place.provider, "head", "base")
    assert "DROP TABLE" in down and "checkpoints (" not in down


def test_the_printed_sql_makes_what_setup_makes_on_sqlite(sqlite_place: Place, tmp_path: Path) -> None:
    by_hand = Place(f"sqlite:///{tmp_path}/hand.db", path=tmp_path / "hand.db")
    with closing(sqlite3.connect(tmp_path / "hand.db")) as connection:
        connection.executescript(schema.sql(by_hand.provider))
    schema.setup(sqlite_place.provider)
    assert schema.check(by_hand.provider) == []
    assert schema.setup(by_hand.provider).changes == ()
    columns = "SELECT m.name, c.* FROM sqlite_master m, pragma_table_info(m.name) c ORDER BY 1, 2"
    assert by_hand.run(columns) == sqlite_place.run(columns)
    with closing(sqlite3.connect(tmp_path / "hand.db")) as connection:
        connection.executescript(schema.sql(by_hand.provider, "head", "base"))
    assert schema.current(by_hand.provider) is None


def test_the_printed_sql_makes_what_setup_makes_on_postgres(
    either_postgres: Place, postgres_server: str, tmp_path: Path
) -> None:
    script = schema.sql(either_postgres.provider)
    schema.setup(either_postgres.provider)
    made_by_setup = _catalogue(either_postgres)
    space = either_postgres.run("SELECT current_database()")[0][0] + "_hand"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {space}".encode())
    try:
        info = psycopg.conninfo.conninfo_to_dict(either_postgres.dsn) | {"dbname": space}
        by_hand = Place(psycopg.conninfo.make_conninfo("", **info), schema=either_postgres.schema)
        _psql(by_hand, script, tmp_path)
        assert _catalogue(by_hand) == made_by_setup
        assert schema.check(by_hand.provider) == []
        assert schema.setup(by_hand.provider).changes == ()
        _psql(by_hand, schema.sql(by_hand.provider, "head", "base"), tmp_path)
        assert schema.current(by_hand.provider) is None
    finally:
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {space} WITH (FORCE)".encode())


def _psql(place: Place, script: str, folder: Path) -> None:
    """Run a script as an administrator does, statement by statement."""
    from persistence.backends.embedded import BIN

    program = BIN / "psql"
    file = folder / "schema.sql"
    file.write_text(script)
    subprocess.run(
        [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", file, place.dsn],
        check=True,
        capture_output=True,
        timeout=60,
    )


def _catalogue(place: Place) -> list[tuple[Any, ...]]:
    """Columns with types and defaults, indexes with definitions, and the versions on record."""
    mine = "('pg_catalog', 'information_schema', 'pg_toast')"
    return (
        place.run(
            "SELECT table_schema, table_name, column_name, data_type, is_nullable, column_default"
            f" FROM information_schema.columns WHERE table_schema NOT IN {mine} ORDER BY 1, 2, 3"
        )
        + place.run(f"SELECT indexdef FROM pg_indexes WHERE schemaname NOT IN {mine} ORDER BY 1")
        + place.run("SELECT v FROM {}checkpoint_migrations ORDER BY v")
        + place.run("SELECT v FROM {}store_migrations ORDER BY v")
    )
