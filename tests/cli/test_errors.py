"""A user's mistake is one clear line and its exit code; no password in it, and nothing changed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.cli.conftest import Run
from tests.support import COMMAND, Result, clean_environment

SECRET = "hunter2-geheim"
QUICK = {"PERSISTENCE_CONNECT_ATTEMPTS": "2", "PERSISTENCE_CONNECT_BACKOFF": "0.05"}


def assert_one_line(result: Result, exit_code: int, *parts: str) -> None:
    """One line on standard error, with these parts, and nothing on standard output."""
    assert result.returncode == exit_code, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert SECRET not in result.stderr
    for part in parts:
        assert part in lines[0], result.stderr


def snapshot(folder: Path) -> dict[str, str]:
    """Every file with its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tables(dsn: str) -> int:
    """How many tables the database has."""
    with psycopg.connect(dsn) as conn:
        row = conn.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("command", [["status"], ["setup"], ["schema", "check"]])
@pytest.mark.parametrize(
    ("dsn", "exit_code", "parts"),
    [
        ("chat.db", 2, ["sqlite:///chat.db"]),
        ("", 2, []),
        ("sqlite:///chat.db?synchronus=off", 2, ["synchronus", "synchronous"]),
        (f"postgresql://u:{SECRET}@host/db?pool_max=many", 2, ["pool_max", "many"]),
        ("sqlit:///chat.db", 2, ["sqlit", "sqlite"]),
        (f"mongodb://u:{SECRET}@host/db", 2, ["mongodb", "memory", "postgresql", "sqlite"]),
        (f"postgresql://u:{SECRET}@127.0.0.1:1/db", 3, ["127.0.0.1"]),
        (f"host=127.0.0.1 port=1 user=u password='{SECRET}'", 3, ["127.0.0.1"]),
    ],
)
def test_wrong_dsn(
    run: Run, tmp_path: Path, command: list[str], dsn: str, exit_code: int, parts: list[str]
) -> None:
    assert_one_line(run(*command, "--dsn", dsn, env=QUICK), exit_code, *parts)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("spelling", ["url", "keywords", "query", "variable", "settings", "file"])
@pytest.mark.parametrize("flag", [[], ["--json"], ["--debug"]])
def test_wrong_password(
    run: Run, password_server: str, tmp_path: Path, spelling: str, flag: list[str]
) -> None:
    server = conninfo_to_dict(password_server)
    host, port = str(server["host"]), str(server.get("port", "5432"))
    url = f"postgresql://locked:{SECRET}@{quote(host, safe='')}:{port}/postgres"
    dsn = {
        "keywords": f"host={host} port={port} user=locked password={SECRET} dbname=postgres",
        "query": f"postgresql:///postgres?user=locked&password={SECRET}&host={quote(host)}&port={port}",
    }.get(spelling, url)
    (tmp_path / "dsn").write_text(dsn + "\n")
    arguments, env = {
        "variable": (["--dsn", "env:MY_DSN"], {"MY_DSN": dsn}),
        "settings": ([], {"PERSISTENCE_DSN": dsn}),
        "file": ([], {"PERSISTENCE_DSN_FILE": str(tmp_path / "dsn")}),
    }.get(spelling, (["--dsn", dsn], {}))
    result = run("setup", *arguments, *flag, env=env)
    assert result.returncode == 3, result
    assert SECRET not in result.stdout + result.stderr
    assert "password authentication failed" in result.stdout + result.stderr
    assert "attempt" not in result.stdout + result.stderr, "a wrong password is not worth another attempt"
    if not flag:
        assert_one_line(result, 3, "password authentication failed", "locked")
    if flag == ["--debug"]:
        assert "Traceback" in result.stderr


def test_right_password_is_the_control(run: Run, password_server: str) -> None:
    server = conninfo_to_dict(password_server)
    host = quote(str(server["host"]), safe="")
    result = run("status", "--dsn", f"postgresql://locked:right-secret@/postgres?host={host}")
    assert result.returncode == 0, result
    assert "right-secret" not in result.stdout


@pytest.mark.parametrize("blocked", ["psycopg", "psycopg_pool"])
def test_missing_driver(run_script: Run, tmp_path: Path, blocked: str) -> None:
    """The real command, in a process in which the driver cannot be imported; a true install without it
    is in tests/packaging."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules[{blocked!r}] = None\n")
    result = run_script("setup", "--dsn", f"postgresql://u:{SECRET}@host/db", env={"PYTHONPATH": str(site)})
    assert_one_line(result, 2, 'pip install "langgraph-persistence[postgres]"')


def not_a_database(folder: Path) -> str:
    (folder / "text.db").write_text("This is no database, but it is long enough to look like a file. " * 9)
    return "sqlite:///text.db"


def a_directory(folder: Path) -> str:
    (folder / "folder.db").mkdir()
    return "sqlite:///folder.db"


def no_such_file(folder: Path) -> str:
    return "sqlite:///nothing-here.db"


def empty_file(folder: Path) -> str:
    (folder / "empty.db").touch()
    return "sqlite:///empty.db"


def empty_database(folder: Path) -> str:
    with sqlite3.connect(folder / "other.db") as conn:
        conn.execute("CREATE TABLE shopping (item TEXT)")
    conn.close()
    return "sqlite:///other.db"


BAD_SOURCES = [not_a_database, a_directory, no_such_file, empty_file, empty_database]


@pytest.mark.parametrize("make", BAD_SOURCES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("job", ["migrate", "migrate through an archive", "export", "verify"])
def test_bad_source(run: Run, tmp_path: Path, postgres_dsn: str, make: object, job: str) -> None:
    assert callable(make)
    source = make(tmp_path)
    before = snapshot(tmp_path)
    arguments = {
        "migrate": ["migrate", source, postgres_dsn],
        "migrate through an archive": ["migrate", source, postgres_dsn, "--archive", "archive"],
        "export": ["export", source, "archive"],
        "verify": ["verify", source, postgres_dsn],
    }[job]
    result = run(*arguments)
    assert_one_line(result, 5, source.removeprefix("sqlite:///"))
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "archive").exists()
    assert tables(postgres_dsn) == 0, "nothing is made in the target of a transfer that cannot begin"


def test_unreadable_source(run_unprivileged: Run, tmp_path: Path, chat: Path, postgres_dsn: str) -> None:
    before = snapshot(tmp_path)
    chat.chmod(0)
    assert_one_line(run_unprivileged("migrate", "sqlite:///chat.db", postgres_dsn), 5, "chat.db")
    assert_one_line(run_unprivileged("setup", "--dsn", "sqlite:///chat.db"), 3, "chat.db")
    chat.chmod(0o600)
    assert snapshot(tmp_path) == before
    assert tables(postgres_dsn) == 0


def test_unreadable_folder(run_unprivileged: Run, tmp_path: Path, postgres_dsn: str) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    try:
        assert_one_line(run_unprivileged("migrate", "sqlite:///closed/chat.db", postgres_dsn), 5, "closed")
        assert_one_line(run_unprivileged("verify", "closed/archive"), 5, "closed")
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_folder_that_does_not_exist(run: Run, tmp_path: Path) -> None:
    assert_one_line(run("setup", "--dsn", "sqlite:///nowhere/at/all/chat.db"), 3, "nowhere/at/all")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("make", [not_a_database, a_directory], ids=lambda make: make.__name__)
def test_bad_sqlite_database(run: Run, tmp_path: Path, make: object) -> None:
    assert callable(make)
    dsn = make(tmp_path)
    before = snapshot(tmp_path)
    for command in (["status"], ["setup"], ["schema", "check"], ["schema", "history"]):
        assert_one_line(run(*command, "--dsn", dsn), 3, dsn.removeprefix("sqlite:///"))
    assert snapshot(tmp_path) == before


def test_looking_makes_no_file(run: Run, tmp_path: Path) -> None:
    assert run("status", "--dsn", "sqlite:///none.db").returncode == 0
    assert run("schema", "check", "--dsn", "sqlite:///none.db").returncode == 4
    assert run("schema", "sql", "--dsn", "sqlite:///none.db").returncode == 0
    assert snapshot(tmp_path) == {}


def test_bad_target_leaves_the_source(run: Run, tmp_path: Path, chat: Path) -> None:
    before = snapshot(tmp_path)
    result = run("migrate", "sqlite:///chat.db", f"postgresql://u:{SECRET}@127.0.0.1:1/db", env=QUICK)
    assert_one_line(result, 3, "127.0.0.1")
    result = run("migrate", "sqlite:///chat.db", "memory://")
    assert_one_line(result, 2, "memory")
    result = run("migrate", "sqlite:///chat.db", f"oracle://u:{SECRET}@h/db")
    assert_one_line(result, 2, "oracle")
    assert snapshot(tmp_path) == before


def test_no_archive(run: Run, tmp_path: Path, postgres_dsn: str) -> None:
    (tmp_path / "folder").mkdir()
    for path in ("nothing", "folder"):
        assert_one_line(run("verify", path), 5, path)
        assert_one_line(run("import", path, postgres_dsn), 5, path)
    assert tables(postgres_dsn) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["status", "--dsn", "nope://x"], "dsn", 2),
        (["setup"], "settings", 2),
        (["setup", "--dsn", "env:NOT_SET"], "dsn", 2),
        (["migrate", "memory://", "memory://"], "unsupported", 2),
        (["migrate", "sqlite:///none.db", "postgresql://h/x"], "source", 5),
        (["verify", "nothing"], "archive", 5),
        (["verify", "sqlite:///a.db"], "usage", 2),
        (["migrate", "sqlite:///a.db"], "usage", 2),
        (["schema", "nope"], "usage", 2),
        (["status", "--nope"], "usage", 2),
    ],
)
def test_errors_as_json(run: Run, arguments: list[str], code: str, exit_code: int) -> None:
    result = run(*arguments, "--json")
    assert result.returncode == exit_code, result
    error = json.loads(result.stdout)["error"]
    assert error["code"] == code
    assert error["message"]
    assert set(error) == {"code", "message", "hint"}
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PERSISTENCE_POOL_MAX", "many"), ("PERSISTENCE_DSN", ""), ("PERSISTENCE_DSN_FILE", "/no")],
)
def test_wrong_setting(run_script: Run, variable: str, value: str) -> None:
    assert_one_line(run_script("status", env={variable: value}), 2, variable)


def test_a_working_directory_that_was_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f"cd gone && rmdir ../gone && exec {COMMAND} setup --dsn sqlite:///chat.db"
    result = subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_one_line(result, 2, "the working directory does not exist any more", "absolute")
