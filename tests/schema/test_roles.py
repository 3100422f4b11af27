"""What a role needs: CREATE for the first setup, nothing but the rows afterwards."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from persistence import schema
from persistence.contract import Provider
from persistence.errors import ConnectError, SchemaError
from tests.schema.conftest import Place, quoted

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


@pytest.mark.parametrize("act", [schema.setup, schema.check, schema.history, schema.upgrade])
def test_no_server(act: Callable[[Provider], object]) -> None:
    password = "hunter2"
    with pytest.raises(ConnectError) as caught:
        act(Place(f"postgresql://me:{password}@127.0.0.1:1/none").provider)
    assert password not in "".join(traceback.format_exception(caught.value))
