"""What a role needs: CREATE for the first setup, nothing but the rows afterwards."""

from __future__ import annotations

import asyncio
import subprocess
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

import persistence
from persistence import schema
from persistence.contract import Provider
from persistence.errors import ConnectError, SchemaError
from persistence.settings import Settings
from persistence.testing.subject import at, bare
from tests.docs.pages import DOCS, blocks
from tests.schema.conftest import Place, quoted
from tests.support import COMMAND, clean_environment

MakeRole = Callable[[Place], tuple[str, Place]]


def _grant(place: Place, name: str, rights: str) -> None:
    space = quoted(place.schema or "public")
    place.run(
        f"GRANT USAGE ON SCHEMA {space} TO {name}",
        f"GRANT {rights} ON ALL TABLES IN SCHEMA {space} TO {name}",
    )


@pytest.mark.parametrize("rights", ["SELECT, INSERT, UPDATE, DELETE", "SELECT"])
def test_a_role_without_create_sets_up_once_the_tables_exist(
    either_postgres: Place, role: MakeRole, rights: str
) -> None:
    schema.setup(either_postgres.provider)
    name, as_role = role(either_postgres)
    _grant(either_postgres, name, rights)
    assert schema.setup(as_role.provider).changes == ()
    assert schema.setup(as_role.provider, repair=True).changes == ()
    assert schema.check(as_role.provider) == []
    assert schema.current(as_role.provider) == schema.head()


def test_a_role_without_create_is_told_what_to_do(either_postgres: Place, role: MakeRole) -> None:
    name, as_role = role(either_postgres)
    for repair in (False, True):
        with pytest.raises(SchemaError, match=r"permission denied.*`persistence schema sql`") as caught:
            schema.setup(as_role.provider, repair=repair)
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    # Also where only our own tables are missing.
    schema.setup(either_postgres.provider)
    schema.downgrade(either_postgres.provider, "base")
    _grant(either_postgres, name, "ALL")
    with pytest.raises(
        SchemaError, match=r"permission denied for schema.*`persistence schema sql`"
    ) as caught:
        schema.setup(as_role.provider)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_role_that_may_not_even_read_is_told_so(either_postgres: Place, role: MakeRole) -> None:
    schema.setup(either_postgres.provider)
    name, as_role = role(either_postgres)
    either_postgres.run(f"GRANT USAGE ON SCHEMA {quoted(either_postgres.schema or 'public')} TO {name}")
    with pytest.raises(SchemaError, match="permission denied for table"):
        schema.check(as_role.provider)


def test_a_role_that_may_create_in_its_schema_needs_no_right_to_make_schemas(
    postgres_schema_place: Place, role: MakeRole
) -> None:
    name, as_role = role(postgres_schema_place)
    postgres_schema_place.run(
        f"CREATE SCHEMA {quoted(postgres_schema_place.schema or '')} AUTHORIZATION {name}"
    )
    schema.setup(as_role.provider)
    assert schema.check(as_role.provider) == []


@pytest.fixture
def two_roles(postgres_dsn: str) -> Iterator[tuple[Place, Place]]:
    """The owner and the application, made by the first statements of docs/security.md."""
    admin = Place(postgres_dsn)
    (statements, _) = (block.text for block in blocks(DOCS / "security.md") if block.language == "sql")
    suffix = str(admin.run("SELECT current_database()")[0][0])
    names = {name: f"{name}_{suffix}" for name in ("chat_owner", "chat_app")}
    for name, mine in names.items():
        statements = statements.replace(name, mine)
    admin.run(*filter(str.strip, statements.split(";")))
    info = psycopg.conninfo.conninfo_to_dict(persistence.Dsn.parse(postgres_dsn).conninfo)
    owner, application = (
        Place(
            psycopg.conninfo.make_conninfo("", **info | {"user": names[name], "password": password}),
            schema="app",
        )
        for name, password in (("chat_owner", "change-me-1"), ("chat_app", "change-me-2"))
    )
    yield owner, application
    for name in names.values():
        admin.run(f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}")


def test_the_application_needs_only_rows(two_roles: tuple[Place, Place]) -> None:
    """All that an application does, as the role of docs/security.md."""
    owner, application = two_roles
    settings = Settings(db_schema="app", setup_on_open=False)
    with persistence.open(application.dsn, settings=settings) as db, pytest.raises(SchemaError):
        assert db.checkpointer is not None
        db.checkpointer.get_tuple(at("t"))
    schema.setup(owner.provider)
    with persistence.open(application.dsn, settings=settings) as db:
        _use(db)
    asyncio.run(_ause(application.dsn, settings))
    command = [COMMAND, "status", "--ready", "--dsn", application.dsn]
    environment = clean_environment() | {"PERSISTENCE_SCHEMA": "app"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result


def _use(db: persistence.Persistence) -> None:
    saver: Any = db.checkpointer
    for thread in ("t", "gone"):
        for id_ in ("1", "2"):
            config = saver.put(at(thread), bare(id_, {"x": [id_]}), {"run_id": f"run-{id_}"}, {"x": 1})
            saver.put_writes(config, [("x", id_)], "task")
    saver.copy_thread("t", "copy")
    saver.delete_for_runs(["run-1"])
    saver.prune(["copy"])
    saver.delete_thread("gone")
    assert [(c.config["configurable"]["thread_id"], c.checkpoint["id"]) for c in saver.list(None)] == [
        ("copy", "2"),
        ("t", "2"),
    ]
    store: Any = db.store
    store.put(("a",), "k", {"v": 1}, ttl=60)
    assert [item.key for item in store.search(("a",))] == ["k"]
    assert store.sweep_ttl() == 0
    store.delete(("a",), "k")
    assert store.get(("a",), "k") is None


async def _ause(dsn: str, settings: Settings) -> None:
    async with persistence.aopen(dsn, settings=settings) as db:
        saver: Any = db.checkpointer
        await saver.aput(at("async"), bare("1", {"x": ["1"]}), {}, {"x": 1})
        assert (await saver.aget_tuple(at("async"))).checkpoint["channel_values"] == {"x": ["1"]}
        await saver.adelete_thread("async")
        store: Any = db.store
        await store.aput(("a",), "k", {"v": 1})
        assert (await store.aget(("a",), "k")).value == {"v": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE app.mine (a int)",
        "CREATE INDEX mine ON app.checkpoints (metadata)",
        "ALTER TABLE app.checkpoints ADD COLUMN mine int",
        "TRUNCATE app.checkpoints",
        "DROP TABLE app.checkpoint_writes",
        "DROP SCHEMA app CASCADE",
        "CREATE SCHEMA mine",
    ],
)
def test_the_application_cannot_change_the_tables(two_roles: tuple[Place, Place], statement: str) -> None:
    owner, application = two_roles
    schema.setup(owner.provider)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        application.run(statement)
    assert schema.check(owner.provider) == []


@pytest.mark.parametrize("act", [schema.setup, schema.check, schema.history, schema.upgrade])
def test_no_server(act: Callable[[Provider], object]) -> None:
    password = "hunter2"
    with pytest.raises(ConnectError) as caught:
        act(Place(f"postgresql://me:{password}@127.0.0.1:1/none").provider)
    assert password not in "".join(traceback.format_exception(caught.value))
