"""LangGraph's agent server as a process of its own, on SQLite and on Postgres."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from langgraph_sdk import get_client
from langgraph_sdk.client import LangGraphClient

import persistence
from tests.docs.pages import DOCS, blocks
from tests.support import clean_environment, fresh_database

OFFLINE = {
    "LANGGRAPH_CLI_NO_ANALYTICS": "1",
    "LANGGRAPH_NO_VERSION_CHECK": "true",
    "LANGSMITH_TRACING": "false",
    "LANGSMITH_API_KEY": "",
}


@dataclass
class AgentServer:
    """``langgraph dev`` in a folder of its own, its database, and everything that it has logged."""

    folder: Path
    dsn: str
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.starts += 1
        program = str(Path(sys.executable).with_name("langgraph"))
        options = ["--no-browser", "--no-reload", "--n-jobs-per-worker=9", "--host=127.0.0.1"]
        with (self.folder / f"{self.starts}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [program, "dev", *options, f"--port={self.port}"],
                cwd=self.folder,
                env=clean_environment() | OFFLINE | {"PERSISTENCE_DSN": self.dsn, "LOG_JSON": "true"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 120
        with httpx.Client(base_url=self.url) as client:
            while not _answers(client):
                assert self.process.poll() is None, self.text()
                assert time.monotonic() < deadline, self.text()
                time.sleep(0.1)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(60) in (0, -15)  # uvicorn raises the signal again when it is done

    def text(self) -> str:
        """What the latest process wrote."""
        return (self.folder / f"{self.starts}.log").read_text()

    def complaints(self) -> list[dict[str, Any]]:
        """What the latest process logged as a warning or worse, or of methods that it would like to have."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        assert any("Application started up" in line["event"] for line in lines)
        lacks = [line for line in lines if line["event"].startswith("Custom checkpointer missing")]
        return lacks + [line for line in lines if line["level"] not in ("debug", "info")]

    def open(self) -> AbstractAsyncContextManager[persistence.AsyncPersistence]:
        """The server's database, through savers of our own."""
        return persistence.aopen(self.dsn)

    def rows(self, thread: str) -> int:
        """How many rows the thread has in all of LangGraph's tables."""
        count = "SELECT " + " + ".join(
            f"(SELECT count(*) FROM {table} WHERE thread_id = '{thread}')" for table in self.tables
        )
        if self.dsn.startswith("sqlite"):
            with closing(sqlite3.connect(self.dsn.removeprefix("sqlite:///"))) as conn:
                return int(conn.execute(count).fetchone()[0])
        with psycopg.connect(self.dsn) as conn:
            row = conn.execute(count.encode()).fetchone()
            assert row is not None
            return int(row[0])

    @property
    def tables(self) -> list[str]:
        if self.dsn.startswith("sqlite"):
            return ["checkpoints", "writes"]
        return ["checkpoints", "checkpoint_blobs", "checkpoint_writes"]


def block_of_page(language: str) -> str:
    """What ``docs/agent-server.md`` tells the reader to write."""
    return next(block.text for block in blocks(DOCS / "agent-server.md") if block.language == language)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ok").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def server(
    request: pytest.FixtureRequest, postgres_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentServer]:
    folder = tmp_path_factory.mktemp("agent")
    shutil.copy(Path(__file__).with_name("agent.py"), folder)
    (folder / "langgraph.json").write_text(block_of_page("json"))
    with fresh_database(postgres_server) as postgres:
        dsn = {"sqlite": f"sqlite:///{folder}/agent.db", "postgres": postgres}[request.param]
        server = AgentServer(folder, dsn)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture
async def client(server: AgentServer) -> AsyncIterator[LangGraphClient]:
    async with get_client(url=server.url) as client:
        yield client


@pytest.fixture
async def db(server: AgentServer) -> AsyncIterator[persistence.AsyncPersistence]:
    async with server.open() as db:
        yield db
