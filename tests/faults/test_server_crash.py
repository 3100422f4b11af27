"""W6 and W3 on a server that crashes under load: all that was acknowledged is there, and nothing in part."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import persistence
from persistence.backends import embedded
from persistence.errors import ConnectError
from persistence.testing.subject import at, bare
from tests.support import query_form

WORKERS = 16
CRASHES = int(os.environ.get("FAULTS_CRASHES", "2"))


@pytest.fixture
def server() -> Iterator[str]:
    """Conninfo of a server of the test's own, as durable as Postgres is by default."""
    # Not in pytest's folder: each pytest that starts closes it to other users, the server's too.
    with (
        tempfile.TemporaryDirectory(prefix="persistence-crash-") as name,
        embedded.serve((Path(name) / "pg").resolve()) as conninfo,
    ):
        yield conninfo


def crash(conninfo: str) -> None:
    """Kill one of the server's processes: it ends all others at once, and recovers from its log."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert conn.execute(f"SHOW {setting}").fetchone() == ("on",)
        row = conn.execute(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = 'app' AND backend_type = 'client backend' LIMIT 1"
        ).fetchone()
    assert row is not None
    os.kill(row[0], signal.SIGKILL)


async def test_acknowledged_checkpoints_survive_a_crash_of_the_server(server: str, tmp_path: Path) -> None:
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute("CREATE DATABASE app")
    acknowledged: set[tuple[int, int]] = set()
    lost: list[ConnectError] = []
    stop = asyncio.Event()
    url = "postgresql://" + query_form(psycopg.conninfo.make_conninfo(server, dbname="app"))

    async def converse(saver: Any, worker: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            values = {"list": [worker, number], "text": "x" * 2000, "number": number}
            versions = dict.fromkeys(values, f"{number:06}")
            try:
                config = await saver.aput(
                    at(f"t{worker}"), bare(f"{number:06}", values, versions), {}, versions
                )
                await saver.aput_writes(config, [("list", [number]), ("number", number)], "task")
            except ConnectError as error:
                lost.append(error)
                await asyncio.sleep(0.05)
            else:
                acknowledged.add((worker, number))

    async with persistence.aopen(url + "&pool_max=8") as db:
        running = [asyncio.create_task(converse(db.checkpointer, worker)) for worker in range(WORKERS)]
        for _ in range(CRASHES):
            before = len(acknowledged)
            while len(acknowledged) < before + 200:  # it works again, without having been opened anew
                await asyncio.sleep(0.02)
                assert not any(task.done() for task in running)
            await asyncio.to_thread(crash, server)
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*running)
        assert lost
        assert db.checkpointer is not None
        found: dict[tuple[int, int], Any] = {}
        async for stored in db.checkpointer.alist(None):
            number = stored.checkpoint["channel_values"]["number"]
            worker = stored.checkpoint["channel_values"]["list"][0]
            found[worker, number] = stored
    assert acknowledged <= found.keys()
    for (worker, number), stored in found.items():
        expected = {"list": [worker, number], "text": "x" * 2000, "number": number}
        assert stored.checkpoint["channel_values"] == expected
        writes = [("task", "list", [number]), ("task", "number", number)]
        assert stored.pending_writes == writes or (
            stored.pending_writes == [] and (worker, number) not in acknowledged
        )
