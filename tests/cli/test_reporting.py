"""The dry run, the report file and the progress of the console command."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest

from persistence import transfer
from tests.cli.conftest import Run
from tests.support import COMMAND, clean_environment

CHAT = "sqlite:///chat.db"


def report(path: Path) -> Any:
    return json.loads(path.read_text())


def test_dry_run(run: Run, chat: Path, tmp_path: Path, postgres_dsn: str) -> None:
    result = run("migrate", CHAT, postgres_dsn, "--dry-run")
    assert result.returncode == 0, result
    assert "would move" in result.stdout
    assert "nothing was written" in result.stdout
    assert "estimated time" in result.stdout
    with psycopg.connect(postgres_dsn) as conn:
        assert conn.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchall() == [(0,)]
    assert run("export", CHAT, "copy", "--dry-run").returncode == 0
    assert not (tmp_path / "copy").exists()
    transfer.export(chat, tmp_path / "copy")
    plan = json.loads(run("import", "copy", postgres_dsn, "--dry-run", "--json").stdout)
    assert plan["would_move"] is True
    assert plan["totals"]["threads"] == 2
    again = run("export", CHAT, "copy", "--dry-run")
    assert again.returncode == 6
    assert "would stop" in again.stdout
    assert "exists already" in again.stdout


def test_dry_run_against_the_target(run: Run, chat: Path, postgres_dsn: str) -> None:
    without = run("migrate", CHAT, postgres_dsn, "--dry-run", "--against-target")
    assert without.returncode == 4
    assert "persistence setup" in without.stderr
    assert run("setup", "--dsn", postgres_dsn).returncode == 0
    result = run("migrate", CHAT, postgres_dsn, "--dry-run", "--against-target")
    assert result.returncode == 0
    assert "as the target itself says" in result.stdout
    assert "writing" in result.stdout
    assert run("migrate", CHAT, postgres_dsn, "--against-target").returncode == 2


def test_conflicts_end_with_6(run: Run, chat: Path, postgres_dsn: str) -> None:
    assert run("migrate", CHAT, postgres_dsn, "--thread", "bob").returncode == 0
    result = run("migrate", CHAT, postgres_dsn, "--dry-run")
    assert result.returncode == 6
    assert re.search(r"^conflict  1 x .* already has thread 'bob'$", result.stdout, re.MULTILINE)
    assert "thread 'bob'" in result.stdout


def test_reports_of_all_commands(run: Run, chat: Path, tmp_path: Path) -> None:
    for arguments, name, outcome in (
        (["migrate", CHAT, "sqlite:///t.db", "--dry-run"], "plan.html", "would move"),
        (["migrate", CHAT, "sqlite:///t.db"], "migrated.json", "succeeded"),
        (["verify", CHAT, "sqlite:///t.db"], "verified.html", "equal"),
        (["export", CHAT, "copy"], "exported.json", "succeeded"),
        (["verify", "copy"], "checked.html", "intact"),
        (["import", "copy", "sqlite:///u.db"], "imported.json", "succeeded"),
    ):
        result = run(*arguments, "--report", name)
        assert result.returncode == 0, result
        text = (tmp_path / name).read_text()
        if name.endswith(".html"):
            assert f">{outcome}<" in text
        else:
            said = json.loads(text)
            assert (said["command"], said["outcome"]) == (arguments[0], outcome)
            assert said["result"]["totals"]["threads"] == 2


def test_a_failed_run_never_reports_success(run: Run, chat: Path, tmp_path: Path, postgres_dsn: str) -> None:
    assert run("migrate", CHAT, postgres_dsn, "--thread", "bob", "--report", "r.json").returncode == 0
    assert report(tmp_path / "r.json")["outcome"] == "succeeded"
    failed = run("migrate", CHAT, postgres_dsn, "--report", "r.json")
    assert failed.returncode == 6
    said = report(tmp_path / "r.json")
    assert (said["outcome"], said["error"]["code"]) == ("failed", "conflict")
    assert "result" not in said
    assert said["progress"][0]["phase"] == "read"
    with psycopg.connect(postgres_dsn) as conn:
        conn.execute("DELETE FROM checkpoint_writes")
    assert run("verify", CHAT, postgres_dsn, "--report", "r.html").returncode == 7
    assert ">different<" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped(tmp_path: Path, chat: Path, number: signal.Signals) -> None:
    """While it waits for a server that accepts the connection and says nothing."""
    path = tmp_path / "r.json"
    path.write_text('{"outcome": "succeeded"}')
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = subprocess.Popen(
            [
                COMMAND,
                "migrate",
                CHAT,
                f"postgresql://u:hunter2-geheim@127.0.0.1:{port}/db",
                "--report",
                "r.json",
            ],
            env=clean_environment(),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        connection, _ = server.accept()
        with connection:
            process.send_signal(number)
            process.wait(60)
    said = report(path)
    assert said["outcome"] == ("running" if number == signal.SIGKILL else "failed")
    assert "hunter2-geheim" not in path.read_text()
    assert "u:***@" in said["target"]


def test_a_report_that_cannot_be_written(run: Run, chat: Path, tmp_path: Path) -> None:
    early = run("migrate", CHAT, "sqlite:///t.db", "--report", "nowhere/r.html", "--json")
    assert early.returncode == 1
    assert json.loads(early.stdout)["error"]["code"] == "report"
    assert not (tmp_path / "t.db").exists()
    assert run("migrate", CHAT, "sqlite:///t.db", "--report", "r.pdf").returncode == 2


def test_a_report_that_cannot_be_written_any_more(
    run: Run, run_script: Run, chat: Path, tmp_path: Path
) -> None:
    """The place of the report goes away while the run goes on: the data is safe, and the command says so."""
    (tmp_path / "sitecustomize.py").write_text(
        "import persistence.transfer.api as api, shutil\n"
        "finish = api.finish\n"
        "def late(*args):\n"
        "    shutil.rmtree('reports')\n"
        "    return finish(*args)\n"
        "api.finish = late\n"
    )
    (tmp_path / "reports").mkdir()
    result = run_script(
        *("migrate", CHAT, "sqlite:///t.db", "--report", "reports/r.json", "--json"),
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    assert result.returncode == 1, result
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "report"
    assert "the run itself has ended: succeeded" in error["message"]
    assert json.loads(run("verify", CHAT, "sqlite:///t.db", "--json").stdout)["equal"] is True


def test_notes_are_in_the_summary(run: Run, chat: Path, tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(chat) as conn:
        conn.execute("UPDATE writes SET checkpoint_id = 'gone' WHERE thread_id = 'bob'")
    conn.close()
    result = run("migrate", CHAT, "sqlite:///t.db")
    assert result.returncode == 0, result
    assert "note   " in result.stdout
    assert "pending writes belong to checkpoints that are not there" in result.stdout
    assert "less than with copies" not in result.stdout


def test_events(run: Run, chat: Path, tmp_path: Path) -> None:
    result = run("migrate", CHAT, "sqlite:///t.db", "--json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert [(event["event"], event["phase"]) for event in events] == [
        (event, phase) for phase in ("read", "write", "verify") for event in ("begin", "end")
    ]
    fields = {
        *("event", "phase", "done", "total", "bytes", "seconds"),
        *("checkpoints_per_second", "bytes_per_second", "seconds_left"),
    }
    assert all(set(event) == fields for event in events)
    ends = [event for event in events if event["event"] == "end"]
    assert all(event["done"] == event["total"] > 0 for event in ends)
    assert json.loads(result.stdout)["totals"]["checkpoints"] == ends[0]["done"]
