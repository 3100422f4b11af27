"""The savers through a real PgBouncer in transaction mode: each statement may go to another connection.

`make pgbouncer` runs them; they are not part of `make test`, because no wheel brings a PgBouncer:
hence the name of this file. Its configuration is the one in ``docker-compose.yml``.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import psycopg
import pytest
from langgraph.graph import END, START, StateGraph
from psycopg.conninfo import conninfo_to_dict
from ruamel.yaml import YAML

import persistence
from persistence import transfer
from persistence.settings import Settings
from tests.support import ROOT, query_form
from tests.transfer import graphs

_PROGRAM = os.environ.get("PERSISTENCE_TEST_PGBOUNCER") or shutil.which(
    "pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin"
)


class Count(TypedDict):
    n: int
    seen: list[int]


def _graph(saver: Any) -> Any:
    builder = StateGraph(Count)
    builder.add_node("add", lambda state: {"n": state["n"] + 1, "seen": [*state["seen"], state["n"]]})
    builder.add_conditional_edges(START, lambda state: "add")
    builder.add_conditional_edges("add", lambda state: "add" if state["n"] < 5 else END)
    return builder.compile(checkpointer=saver)


def _thread(number: int) -> Any:
    return {"configurable": {"thread_id": f"t{number}"}}


@pytest.fixture
def pooled(postgres_dsn: str, tmp_path: Path) -> Iterator[str]:
    """DSN of an empty database behind a PgBouncer with two connections to it."""
    assert _PROGRAM, (
        "no PgBouncer: install one (apt install pgbouncer) or name it in PERSISTENCE_TEST_PGBOUNCER"
    )
    persistence.open(postgres_dsn, settings=Settings()).close()  # makes the tables
    server = conninfo_to_dict(persistence.Dsn.parse(postgres_dsn).conninfo)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, log = tmp_path / "pgbouncer.ini", tmp_path / "pgbouncer.log"
    config.write_text(_configuration(server, port, tmp_path))
    command = [str(_PROGRAM), str(config)]
    if getpass.getuser() == "root":  # as which PgBouncer refuses to run
        folder = Path(str(server.get("host")), f".s.PGSQL.{server.get('port', 5432)}")
        command += ["-u", folder.owner() if folder.exists() else "nobody"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            account = f"user={server['user']} password=persistence"
            conninfo = f"host=127.0.0.1 port={port} {account} dbname={server['dbname']}"
            _wait(conninfo, log)
            yield f"postgresql://{query_form(conninfo)}&pgbouncer=true&pool_max=8"
        finally:
            process.terminate()


def _configuration(server: dict[str, Any], port: int, folder: Path) -> str:
    """What Compose mounts, for another server, other ports, and two connections."""
    configs = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())["configs"]
    users = str(configs["pgbouncer-users"]["content"]).replace(
        "${POSTGRES_PASSWORD:-persistence}", "persistence"
    )
    (folder / "userlist.txt").write_text(users.replace('"persistence" ', f'"{server["user"]}" '))
    (folder / "userlist.txt").chmod(0o644)
    folder.chmod(0o755)
    text = str(configs["pgbouncer-ini"]["content"])
    target = " ".join(f"{key}={server[key]}" for key in ("host", "port", "password") if key in server)
    for compose, here in (
        ("persistence = host=postgres port=5432", f"{server['dbname']} = {target}"),
        ("listen_addr = *", "listen_addr = 127.0.0.1"),
        ("6432", str(port)),
        ("/etc/pgbouncer/userlist.txt", str(folder / "userlist.txt")),
        ("default_pool_size = 20", "default_pool_size = 2"),
    ):
        assert compose in text
        text = text.replace(compose, here)
    return text


def _wait(conninfo: str, log: Path) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            psycopg.connect(conninfo, connect_timeout=2).close()
        except psycopg.OperationalError:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        else:
            return


def _expected(number: int) -> Count:
    return {"n": 5, "seen": list(range(number % 3, 5))}


async def test_async_graphs_at_once(pooled: str) -> None:
    async with persistence.aopen(pooled) as db:
        graph = _graph(db.checkpointer)

        async def run(number: int) -> None:
            await graph.ainvoke({"n": number % 3, "seen": []}, _thread(number))
            state = await graph.aget_state(_thread(number))
            assert state.values == _expected(number)
            steps = [step async for step in graph.aget_state_history(_thread(number))]
            assert len(steps) == 7 - number % 3

        await asyncio.gather(*(run(number) for number in range(12)))
        assert db.checkpointer is not None
        await db.checkpointer.aprune(["t0", "t1"])
        await db.checkpointer.acopy_thread("t0", "copy")
        await db.checkpointer.adelete_thread("t2")
        assert (await graph.aget_state({"configurable": {"thread_id": "copy"}})).values == _expected(0)
        assert await db.checkpointer.aget_tuple(_thread(2)) is None


def test_sync_graph(pooled: str) -> None:
    with persistence.open(pooled) as db:
        graph = _graph(db.checkpointer)
        for number in range(8):
            graph.invoke({"n": number % 3, "seen": []}, _thread(number))
            assert graph.get_state(_thread(number)).values == _expected(number)
        assert db.checkpointer is not None
        db.checkpointer.prune(["t0"], strategy="delete")
        assert db.checkpointer.get_tuple(_thread(0)) is None


def test_threads_at_once(pooled: str) -> None:
    with persistence.open(pooled) as db, ThreadPoolExecutor(40) as threads:
        graph = _graph(db.checkpointer)
        runs = [threads.submit(graph.invoke, {"n": 0, "seen": []}, _thread(number)) for number in range(40)]
        assert [run.result()["n"] for run in runs] == [5] * 40


async def test_store(pooled: str) -> None:
    """Reads of many tasks, by one pipeline, and writes."""
    async with persistence.aopen(pooled) as db:
        assert db.store is not None
        for turn in range(7):  # as often as a statement would have to be used to be prepared
            await asyncio.gather(*(db.store.aput(("a",), f"{n}", {"n": n + turn}) for n in range(20)))
            found = await asyncio.gather(*(db.store.aget(("a",), f"{n}") for n in range(20)))
            assert [item.value["n"] for item in found if item] == [n + turn for n in range(20)]


async def test_health(pooled: str) -> None:
    """Its statements, some of them in a transaction, among those of others."""
    async with persistence.aopen(pooled) as db:
        graph = _graph(db.checkpointer)
        runs = [graph.ainvoke({"n": 0, "seen": []}, _thread(number)) for number in range(8)]
        found, *_ = await asyncio.gather(asyncio.gather(*(db.health(10) for _ in range(20))), *runs)
        assert {health.status for health in found} == {"ok"}, found


@pytest.mark.parametrize("schema", ["public", "new"])
def test_a_transfer(pooled: str, tmp_path: Path, schema: str) -> None:
    """There and back by two connections: with tables and without, written while it is read and after it."""
    source, target = tmp_path / "chat.db", f"{pooled}&schema={schema}"
    graphs.fill(source, threads=1, turns=1)
    began = time.monotonic()
    assert transfer.migrate(source, target).verified
    assert transfer.verify(target, source, check=transfer.Check("semantic")).equal
    assert transfer.migrate(target, f"sqlite:///{tmp_path}/back.db").verified
    assert transfer.migrate(source, target).already_done
    assert time.monotonic() - began < 60, "somebody has waited for a connection"
