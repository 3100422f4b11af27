"""The command as a program: what it prints where, how it ends, what it imports."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persistence import __version__, transfer
from tests.cli.conftest import Run
from tests.support import COMMAND, clean_environment
from tests.transfer import make

COMMANDS = [
    *(["status"], ["setup"], ["migrate"], ["export"], ["import"], ["verify"], ["inspect"]),
    *(["schema", name] for name in ("check", "history", "upgrade", "downgrade", "sql")),
]


def test_version(run_script: Run) -> None:
    result = run_script("--version")
    assert (result.returncode, result.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0
    assert "--json" in result.stdout


def test_no_arguments_show_the_help(run_script: Run) -> None:
    result = run_script()
    assert result.returncode == 2
    assert "migrate" in result.stdout + result.stderr
    assert "error" not in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["migrate", "--help"], ["status", "--nope"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from persistence.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'alembic', 'langgraph', 'psycopg', 'sqlalchemy'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert "loaded" not in result.stderr
    assert result.returncode == (2 if "--nope" in arguments else 0)


def test_unexpected_failure_is_short(run_script: Run, tmp_path: Path) -> None:
    """A defect of ours: no traceback unless it is asked for, and then with the password masked."""
    (tmp_path / "sitecustomize.py").write_text(
        "import persistence.schema as schema\n"
        "def broken(provider):\n"
        "    raise RuntimeError('a defect at ' + provider.dsn.url)\n"
        "schema.check = broken\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "PERSISTENCE_DSN": "postgresql://u:hunter2-geheim@host/db"}
    plain = run_script("schema", "check", env=env)
    assert plain.returncode == 1
    assert len(plain.stderr.splitlines()) == 1
    debug = run_script("schema", "check", "--debug", env=env)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "a defect at postgresql://u:" in debug.stderr
    document = run_script("schema", "check", "--json", env=env)
    assert json.loads(document.stdout)["error"]["code"] == "internal"
    for result in (plain, debug, document):
        assert "hunter2-geheim" not in result.stdout + result.stderr


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    """Stopped while it waits for a server that accepts the connection and then says nothing."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = subprocess.Popen(
            [COMMAND, "setup", "--dsn", f"postgresql://u:hunter2-geheim@127.0.0.1:{port}/db"],
            env=clean_environment(),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A suite that runs in the background of a shell hands on that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        connection, _ = server.accept()
        with connection:
            time.sleep(0.3)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
    assert process.returncode == exit_code, (out, err)
    assert out == ""
    assert "Traceback" not in err
    assert "hunter2-geheim" not in err
    if number == signal.SIGINT:
        assert err == "error: interrupted\n"


def test_reader_goes_away(tmp_path: Path) -> None:
    script = f"'{COMMAND}' schema sql --dsn sqlite:///x.db | true"
    result = subprocess.run(
        ["bash", "-c", script],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("redirected", "exit_code"),
    [("<&- >&- 2>&-", 0), ("--json >/dev/full", 1)],
)
def test_streams_that_take_nothing(tmp_path: Path, chat: Path, redirected: str, exit_code: int) -> None:
    target = f"sqlite:///{tmp_path}/new.db"
    done = subprocess.run(
        ["bash", "-c", f"'{COMMAND}' migrate 'sqlite:///{chat}' '{target}' {redirected}"],
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    assert done.returncode == exit_code
    assert "Traceback" not in done.stderr
    assert transfer.verify(chat, target).equal


def test_text_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with make.database(path) as saver:
        make.put(saver, "Zoë", {})
    env = clean_environment() | {"PYTHONIOENCODING": "ascii"}
    command = [COMMAND, "inspect", f"sqlite:///{path}", "--threads"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "Zo\\xeb" in done.stdout
    assert done.returncode == 0
    done = subprocess.run([COMMAND, "inspect", b"\xff.db"], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "no valid text" in done.stderr


def test_progress_bar_on_a_terminal(tmp_path: Path, chat: Path, postgres_dsn: str) -> None:
    leader, follower = pty.openpty()
    try:
        process = subprocess.Popen(
            [COMMAND, "migrate", f"sqlite:///{chat}", postgres_dsn],
            env=clean_environment() | {"TERM": "xterm", "COLUMNS": "120"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=follower,
            text=True,
        )
        os.close(follower)
        shown = b""
        while process.poll() is None or select.select([leader], [], [], 0)[0]:
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    shown += os.read(leader, 65536)
                except OSError:  # Linux says so when the other end is closed
                    break
        out, _ = process.communicate(timeout=60)
    finally:
        os.close(leader)
    assert process.returncode == 0, shown
    assert "verified by content" in out
    text = shown.decode()
    assert "read" in text
    assert "write" in text
    assert "\x1b[" in text
    assert "/s" in text or "0:00:0" in text
