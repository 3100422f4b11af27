"""The example service: real uvicorn, killed and started again; the conversation is still there."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT, clean_environment


@contextmanager
def service(dsn: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """The example behind uvicorn, as ``docker-compose.yml`` starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "examples.fastapi_chat:app", "--port", str(port)],
        cwd=ROOT,
        env=clean_environment() | {"PERSISTENCE_DSN": dsn},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            _wait(client, process)
            yield client, process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _wait(client: httpx.Client, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert client.get("/health").status_code == 200
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_the_conversation_survives_a_kill(tmp_path: Path, postgres_dsn: str, backend: str) -> None:
    dsn = {"sqlite": f"sqlite:///{tmp_path}/chat.db", "postgres": postgres_dsn}[backend]
    with service(dsn) as (client, process):
        said = client.post("/threads/alice", json={"text": "3 nights in Lisbon"}).json()
        assert said["waiting_for_answer"] == ["3 nights in Lisbon cost 241.5. Book?"]
        assert client.get("/health").json()["server"].startswith(("SQLite", "PostgreSQL"))
        process.kill()
        process.wait(timeout=30)
    with service(dsn) as (client, process):
        assert client.get("/threads/alice").json() == said
        booked = client.post("/threads/alice", json={"text": "yes"}).json()
        assert booked["waiting_for_answer"] == []
        assert booked["messages"][-1] == {"from": "ai", "text": "Booked: 3 nights in Lisbon."}
        assert client.get("/threads/nobody").json() == {"messages": [], "waiting_for_answer": []}
        process.terminate()
        assert process.wait(timeout=30) in (0, -15)
