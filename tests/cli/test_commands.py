"""Each command does its job, in text and in JSON."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from tests.cli.conftest import Run

CHAT = "sqlite:///chat.db"


def document(run: Run, *arguments: str, exit_code: int = 0, env: dict[str, str] | None = None) -> Any:
    """The command's JSON document."""
    result = run(*arguments, "--json", env=env)
    assert result.returncode == exit_code, result
    assert all("event" in json.loads(line) for line in result.stderr.splitlines())
    return json.loads(result.stdout)


@pytest.mark.parametrize("through_archive", [False, True])
def test_migrate_and_verify(run: Run, chat: Path, postgres_dsn: str, through_archive: bool) -> None:
    archive = ["--archive", "archive"] if through_archive else []
    report = document(run, "migrate", CHAT, postgres_dsn, *archive)
    assert report["verified"] is True
    assert report["totals"]["threads"] == 2
    assert document(run, "verify", CHAT, postgres_dsn)["differences"] == []
    with (
        SqliteSaver.from_conn_string(str(chat)) as left,
        PostgresSaver.from_conn_string(postgres_dsn) as right,
    ):
        assert list(right.list(None)) == list(left.list(None))
    if through_archive:
        document(run, "verify", "archive")
        assert document(run, "verify", "archive", postgres_dsn)["differences"] == []
        assert document(run, "verify", CHAT, "archive")["differences"] == []


def test_export_and_import(run: Run, chat: Path, postgres_dsn: str) -> None:
    exported = document(run, "export", CHAT, "archive")
    imported = document(run, "import", "archive", postgres_dsn)
    assert exported["fingerprint"] == imported["fingerprint"]
    assert imported["verified"] is True
    assert document(run, "verify", CHAT, postgres_dsn)["differences"] == []


def test_migrate_again_changes_nothing(run: Run, chat: Path, postgres_dsn: str) -> None:
    assert document(run, "migrate", CHAT, postgres_dsn)["already_done"] is False
    again = document(run, "migrate", CHAT, postgres_dsn)
    assert again["already_done"] is True
    assert again["batches_written"] == 0


def test_summary_for_people(run: Run, chat: Path, postgres_dsn: str) -> None:
    result = run("migrate", CHAT, postgres_dsn)
    assert result.returncode == 0, result
    assert re.search(r"^threads +2$", result.stdout, re.MULTILINE)
    assert re.search(r"^result +migrated, verified by content$", result.stdout, re.MULTILINE)
    assert re.search(r"^verify: \d+ of \d+ checkpoints", result.stderr, re.MULTILINE)
    assert not re.search(r"[ \t]$", result.stdout, re.MULTILINE)


def test_a_difference_is_named(run: Run, chat: Path, postgres_dsn: str) -> None:
    document(run, "migrate", CHAT, postgres_dsn)
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute(
            "UPDATE checkpoint_blobs SET blob = blob || '\\x00' "
            "WHERE thread_id = 'alice' AND channel = 'trip'"
        )
    verdict = document(run, "verify", CHAT, postgres_dsn, exit_code=7)
    assert {d["thread_id"] for d in verdict["differences"]} == {"alice"}
    assert "trip" in {d["channel"] for d in verdict["differences"]}
    result = run("verify", CHAT, postgres_dsn)
    assert result.returncode == 7
    assert "alice" in result.stdout
    assert "the two sides differ" in result.stdout


def test_conflict(run: Run, chat: Path, postgres_dsn: str) -> None:
    document(run, "migrate", CHAT, postgres_dsn)
    with sqlite3.connect(chat) as conn:
        conn.execute("UPDATE checkpoints SET metadata = '{\"source\": \"other\"}' WHERE thread_id = 'bob'")
    conn.close()
    error = document(run, "migrate", CHAT, postgres_dsn, exit_code=6)["error"]
    assert error["code"] == "conflict"


def test_setup_and_status(run: Run, postgres_dsn: str) -> None:
    env = {"PERSISTENCE_DSN": postgres_dsn}
    before = document(run, "status", env=env)
    assert before["connected"] is True
    assert before["server"].startswith("PostgreSQL")
    assert before["migrated"] is False and before["ready"] is False
    assert before["problem"]["hint"] == "run: persistence setup"
    assert document(run, "status", "--ready", env=env, exit_code=4)["problem"]["code"] == "schema"
    assert document(run, "setup", env=env)["changes"]
    assert document(run, "setup", env=env)["changes"] == []
    after = document(run, "status", env=env)
    assert after["migrated"] is True and after["ready"] is True
    assert after["revision"]
    assert after["write_ms"] > 0
    document(run, "status", "--ready", env=env)


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_schema_commands(run: Run, postgres_dsn: str, backend: str) -> None:
    env = {"PERSISTENCE_DSN": {"sqlite": "sqlite:///new.db", "postgres": postgres_dsn}[backend]}
    assert document(run, "schema", "check", env=env, exit_code=4)["ok"] is False
    assert "CREATE TABLE" in document(run, "schema", "sql", env=env)["sql"]
    document(run, "setup", env=env)
    assert document(run, "schema", "check", env=env) == {
        "dsn": env["PERSISTENCE_DSN"],
        "ok": True,
        "differences": [],
    }
    revisions = document(run, "schema", "history", env=env)["revisions"]
    assert all(revision["applied"] for revision in revisions)
    assert document(run, "schema", "downgrade", "base", env=env)["revision"] is None
    check = run("schema", "check", env=env)
    assert check.returncode == 4
    assert "persistence schema upgrade" in check.stdout
    assert document(run, "schema", "upgrade", env=env)["revision"] == revisions[-1]["revision"]
    history = run("schema", "history", env=env)
    assert "applied" in history.stdout


def test_status_without_a_dsn(run: Run) -> None:
    report = document(run, "status")
    assert report["backend"] == "memory"
    assert "PERSISTENCE_DSN" in report["reason"]
    assert document(run, "status", "--ready", exit_code=2)["error"]["code"] == "settings"


def test_status_makes_no_file(run: Run, tmp_path: Path) -> None:
    report = document(run, "status", "--dsn", "sqlite:///absent.db")
    assert report["problem"]["code"] == "connect"
    assert not (tmp_path / "absent.db").exists()
    document(run, "status", "--dsn", "sqlite:///absent.db", "--ready", exit_code=3)


def test_status_when_postgres_is_switched_off(run: Run) -> None:
    env = {
        "PERSISTENCE_DSN": "postgresql://u:hunter2-geheim@127.0.0.1:1/db",
        "PERSISTENCE_USE_POSTGRES": "false",
    }
    report = document(run, "status", env=env)
    assert report["backend"] == "memory"
    assert report["status"] == "degraded"
    assert "PERSISTENCE_USE_POSTGRES" in report["degraded"]
    assert "hunter2" not in json.dumps(report)


def test_dsn_from_a_variable(run: Run, chat: Path, postgres_dsn: str) -> None:
    env = {"OLD": CHAT, "NEW": postgres_dsn}
    assert document(run, "migrate", "env:OLD", "env:NEW", env=env)["verified"] is True
    assert document(run, "verify", "env:OLD", "env:NEW", env=env)["differences"] == []


def test_terminal_codes_in_names_are_not_printed(run: Run, chat: Path, tmp_path: Path) -> None:
    chat.rename(tmp_path / "ch\x1b[31mat.db")
    dsn = "sqlite:///ch\x1b[31mat.db"
    shown = run("status", "--dsn", dsn)
    refused = run("setup", "--dsn", "sqlite:///no\x1b[31mfolder/chat.db")
    (tmp_path / "ar\x1b[31mchive").mkdir()
    no_archive = run("verify", "ar\x1b[31mchive")
    for result in (shown, refused, no_archive):
        assert "31m" in result.stdout + result.stderr
        assert "\x1b" not in result.stdout + result.stderr
