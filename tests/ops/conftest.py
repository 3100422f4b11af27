"""What the tests of opening, losing and closing databases share."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import psycopg
import pytest
from langgraph.graph import END, START, StateGraph

from persistence.backends import embedded
from persistence.settings import get_settings

PASSWORD = "s3cr3t/pa ss"


class Count(TypedDict):
    n: int


def counter() -> StateGraph[Count]:
    """A graph that adds one."""
    builder = StateGraph(Count)
    builder.add_node("add", lambda state: {"n": state["n"] + 1})
    builder.add_edge(START, "add")
    builder.add_edge("add", END)
    return builder


def thread(name: str = "t") -> Any:
    return {"configurable": {"thread_id": name}}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings of the person who runs the tests but for a slow machine; a working directory of its own."""
    import os

    for name in os.environ:
        if name.upper().startswith("PERSISTENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PERSISTENCE_HEALTH_TIMEOUT", "60")
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture(params=["memory", "sqlite", "sqlite in memory", "postgres", "postgres with a schema"])
def dsn(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A DSN of every kind, of an empty database."""
    if request.param.startswith("postgres"):
        text: str = request.getfixturevalue("postgres_dsn")
        return f"{text}&schema=Odd%20%22name" if "schema" in request.param else text
    return {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/x.db", "sqlite in memory": "sqlite://"}[
        request.param
    ]


@pytest.fixture(params=["sqlite", "sqlite in memory", "postgres", "postgres with a schema"])
def table_dsn(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A DSN of every kind that has tables."""
    if request.param.startswith("postgres"):
        text: str = request.getfixturevalue("postgres_dsn")
        return f"{text}&schema=Odd%20%22name" if "schema" in request.param else text
    return f"sqlite:///{tmp_path}/x.db" if request.param == "sqlite" else "sqlite://"


@dataclass
class OwnServer:
    """A server that a test may stop, start and kill; the role ``app`` needs a password."""

    folder: Path
    conninfo: str

    def program(self, *command: str) -> None:
        embedded._program(self.folder, embedded._account(self.folder), list(command))

    def stop(self, mode: str = "fast") -> None:
        self.program("pg_ctl", "stop", "-w", "-m", mode)

    def start(self) -> None:
        embedded._start(self.folder, embedded._account(self.folder))

    def dsn(self, password: str | None = None, database: str = "postgres") -> str:
        from urllib.parse import quote

        user = "postgres" if password is None else f"app:{quote(password, safe='')}"
        return f"postgresql://{user}@/{database}?host={quote(str(self.folder), safe='')}"


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnServer]:
    # Not in pytest's folder: each pytest that starts closes it to other users, the server's too.
    with tempfile.TemporaryDirectory(prefix="persistence-own-") as name:
        folder = (Path(name) / "pg").resolve()
        yield from _serving(folder)


def _serving(folder: Path) -> Iterator[OwnServer]:
    with embedded.serve(folder) as conninfo:
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute(f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'".encode())
            conn.execute("GRANT ALL ON DATABASE postgres TO app")
            conn.execute("GRANT ALL ON SCHEMA public TO app")
        rules = folder / "data" / "pg_hba.conf"
        rules.write_text("local all app scram-sha-256\n" + rules.read_text())
        server = OwnServer(folder, conninfo)
        server.program("pg_ctl", "reload")
        yield server


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    """What our own loggers said at this level or above."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("persistence") and record.levelno >= level
    ]
