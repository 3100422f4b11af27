"""The main job, end to end: a conversation moves from SQLite to Postgres in the middle of a question.

Every step is a process of its own, run as a user would run it; what it prints is a transcript. The
Postgres server comes from a wheel and lives in ``.demo/``; ``PERSISTENCE_TEST_POSTGRES`` names another.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(".demo")
MARKER = FOLDER / ".made-by-demo"
SQLITE = f"sqlite:///{FOLDER}/chat.db"
ARCHIVE = FOLDER / "archive"

CHAT = ["python", "-m", "examples.trip_planner"]


def main() -> int:
    """Run all steps; the first that fails ends the demo with its exit code."""
    os.chdir(ROOT)
    _fresh_folder()
    try:
        with _postgres() as postgres:
            _steps(postgres)
    except subprocess.CalledProcessError as error:
        print(f"\nthe demo stopped: exit code {error.returncode}", file=sys.stderr)
        return error.returncode
    print(f"\nverified. The archive is still there: persistence verify {ARCHIVE}")
    return 0


def _steps(postgres: str) -> None:
    _title("Conversations on SQLite. Bob's ends; Alice's stops inside a subgraph, at a question")
    _run([*CHAT, "say", "bob", "2 nights in Oslo"], dsn=SQLITE)
    _run([*CHAT, "answer", "bob", "no"], dsn=SQLITE)
    _run([*CHAT, "say", "alice", "3 nights in Lisbon, please"], dsn=SQLITE)

    _title("All of it moves to Postgres, through an archive with checksums")
    _run(["persistence", "migrate", SQLITE, postgres, "--archive", str(ARCHIVE)])

    _title("The two databases hold the same, by content")
    _run(["persistence", "verify", SQLITE, postgres])

    _title("Alice answers. Only the DSN has changed; the conversation goes on where it was")
    _run([*CHAT, "answer", "alice", "yes"], dsn=postgres)
    _run([*CHAT, "say", "alice", "Thank you. What did I book?"], dsn=postgres)
    _run([*CHAT, "show", "alice"], dsn=postgres)

    _title("The archive proves itself, alone")
    _run(["persistence", "verify", str(ARCHIVE)])


_step = 0


def _title(text: str) -> None:
    global _step
    _step += 1
    print(f"\n== {_step}. {text}", flush=True)


def _run(command: list[str], dsn: str | None = None) -> None:
    """Show a command and run it, with the programs of this very environment."""
    shown = f"PERSISTENCE_DSN={shlex.quote(dsn)} " if dsn else ""
    print(f"\n$ {shown}{shlex.join(command)}", flush=True)
    program = sys.executable if command[0] == "python" else str(Path(sys.executable).with_name(command[0]))
    # Settings of the person's own must not change what the demo shows.
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("PERSISTENCE_")}
    if dsn:
        environment["PERSISTENCE_DSN"] = dsn
    subprocess.run([program, *command[1:]], env=environment, check=True)  # noqa: S603


def _fresh_folder() -> None:
    """Begin with an empty folder; only one that the demo itself made is removed."""
    if FOLDER.exists():
        if not MARKER.exists():
            sys.exit(f"error: {FOLDER.resolve()} was not made by the demo; move it away first")
        shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    MARKER.touch()


@contextmanager
def _postgres() -> Iterator[str]:
    """The DSN of an empty Postgres database."""
    server = os.environ.get("PERSISTENCE_TEST_POSTGRES")
    if not server:
        yield f"postgres+embedded:///{FOLDER}/postgres"
        return
    import psycopg
    from psycopg.conninfo import make_conninfo

    name = f"persistence_demo_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(f'CREATE DATABASE "{name}"')
    try:
        yield make_conninfo(server, dbname=name)
    finally:
        with psycopg.connect(server, autocommit=True) as conn:
            conn.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


if __name__ == "__main__":
    sys.exit(main())
