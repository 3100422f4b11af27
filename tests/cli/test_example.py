"""The examples run, each in its own process: the service behind a real uvicorn, the worker, the script."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from langchain_core.messages import HumanMessage

import persistence
from examples import trip_planner
from tests.support import ROOT, clean_environment
from tests.warm import Warm


@contextmanager
def service(dsn: str, warm: Warm) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """The example behind uvicorn, as ``docker-compose.yml`` starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [warm.python, "-m", "uvicorn", "examples.fastapi_chat:app", "--port", str(port)],
        cwd=ROOT,
        env=clean_environment() | {"PERSISTENCE_DSN": dsn},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait(client, process)
            yield client, process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _wait(client: httpx.Client, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert client.get("/persistence/readyz").status_code == 200
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


def test_service(postgres_dsn: str, warm: Warm) -> None:
    _cut_off("bob", postgres_dsn)
    with service(postgres_dsn, warm) as (client, process):
        said = client.post("/threads/alice", json={"text": "3 nights in Lisbon"}).json()
        assert said["waiting_for_answer"] == ["3 nights in Lisbon cost 241.5. Book?"]
        assert client.get("/threads/alice").json() == said
        booked = client.post("/threads/alice", json={"text": "yes"}).json()
        assert booked["waiting_for_answer"] == []
        assert booked["messages"][-1] == {"from": "ai", "text": "Booked: 3 nights in Lisbon."}
        assert client.get("/threads/nobody").json() == {"messages": [], "waiting_for_answer": []}
        found = client.get("/persistence/health/checkpointer").json()
        assert found["server"].startswith("PostgreSQL")
        _streams(client)
        assert client.get("/threads/bob").json()["waiting_for_answer"] == []
        answer = client.post("/threads/bob", json={"text": "yes"}).json()  # once the cut-off turn is finished
        assert answer["messages"][-1]["text"] == "Booked: 2 nights in Oslo."
        process.terminate()
        assert process.wait(timeout=60) in (0, -15)


def _cut_off(thread: str, dsn: str) -> None:
    """Leave a turn as a crash after its first step does."""
    with persistence.open(dsn, settings=trip_planner.settings()) as db:
        graph = trip_planner.build(db.checkpointer)
        said = {"messages": [HumanMessage("2 nights in Oslo")]}
        for _ in graph.stream(said, {"configurable": {"thread_id": thread}}, durability="sync"):
            break


def _streams(client: httpx.Client) -> None:
    """Messages come one by one, those that were told before do not, and the conversation is the end."""
    for text, messages in (("1 nights in Rome", 2), ("yes", 1)):
        answer = client.post("/threads/carol/stream", json={"text": text})
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = re.findall(r"event: (.+)\ndata: (.+)\n\n", answer.text)
        assert [name for name, _ in found] == ["message"] * messages + ["conversation"]
        *told, conversation = (json.loads(data) for _, data in found)
        assert conversation == client.get("/threads/carol").json()
        assert told == conversation["messages"][-messages:]


def example(warm: Warm, name: str, dsn: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [warm.python, ROOT / "examples" / f"{name}.py", *arguments],
        env=clean_environment() | {"PERSISTENCE_DSN": dsn},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_script_goes_on_where_it_ended(tmp_path: Path, warm: Warm) -> None:
    dsn = f"sqlite:///{tmp_path}/chat.db"
    for output in (
        ["That was message 1 of ours.", "1 runs so far; the last began with 0 messages."],
        ["That was message 3 of ours.", "2 runs so far; the last began with 2 messages."],
    ):
        assert example(warm, "script", dsn).communicate(timeout=60)[0].splitlines() == output


def test_worker_goes_on_in_the_middle_of_a_job(postgres_dsn: str, tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "long.txt").write_text("\n".join(map(str, range(120))))
    (tmp_path / "over.txt").write_text("1")
    (tmp_path / "over.out").write_text("1.0\n")
    (tmp_path / "short.txt").write_text("1.5\n2")
    with persistence.open(postgres_dsn) as db, example(warm, "worker", postgres_dsn, str(tmp_path)) as first:
        assert db.checkpointer is not None
        until = time.monotonic() + 60
        while len(list(db.checkpointer.list({"configurable": {"thread_id": "long"}}, limit=5))) < 5:
            assert time.monotonic() < until
        first.kill()
        first.wait(timeout=60)
        assert not (tmp_path / "long.out").exists()
        output, _ = example(warm, "worker", postgres_dsn, str(tmp_path)).communicate(timeout=120)
        begun, *rest = output.splitlines()
        done = re.fullmatch(r"long: (\d+) of 120 lines are done already", begun)
        assert done is not None and 0 < int(done[1]) < 120, output
        assert rest == [
            "long: done in 120 steps",  # as many as without a crash
            "short: 0 of 2 lines are done already",
            "short: done in 2 steps",
        ]
        assert (tmp_path / "long.out").read_text() == f"{sum(range(120))}.0\n"
        assert (tmp_path / "short.out").read_text() == "3.5\n"
        assert list(db.checkpointer.list(None)) == []
