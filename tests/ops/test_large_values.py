"""Large values on Postgres: none stays in memory, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import persistence
from persistence import Dsn
from tests.support import query_form

_BEFORE: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


def _checkpoint(**values: Any) -> Any:
    checkpoint = empty_checkpoint()
    checkpoint["channel_values"] = values
    checkpoint["channel_versions"] = dict.fromkeys(values, "1")
    return checkpoint


class _Large(set[int]):
    """Something that a weak reference can point to."""


def test_stored_values_are_let_go(postgres_dsn: str) -> None:
    with persistence.open(postgres_dsn) as db:
        assert db.checkpointer is not None
        serde = _Remembering(db.checkpointer.serde)
        db.checkpointer.serde = serde
        value = _Large({1, 2})
        given = weakref.ref(value)
        checkpoint = _checkpoint(large=value, small=1)
        at = db.checkpointer.put(_BEFORE, checkpoint, {}, {"large": "1", "small": "1"})
        checkpoint["id"] = empty_checkpoint()["id"]
        db.checkpointer.put(at, checkpoint, {}, {})
        del value, checkpoint
        gc.collect()
        assert given() is None
        held = [b for b in serde.blobs if len(gc.get_referrers(b)) > 1]
        assert held == []


class _Remembering:
    """A serializer that remembers the bytes it gave out."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.blobs: list[bytes] = []

    def dumps_typed(self, value: Any) -> tuple[str, bytes]:
        kind, blob = self._inner.dumps_typed(value)
        self.blobs.append(blob)
        return kind, blob

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        return self._inner.loads_typed(data)


def _pieces(number: int) -> list[bytes]:
    """So many pieces of 10 kB, which the server loses no time in making smaller."""
    return [random.Random(i).randbytes(10_000) for i in range(number)]  # noqa: S311 - no secret


@dataclass
class Line:
    """A line to the database that takes some ten megabytes a second; ``moved`` counts them."""

    dsn: str = ""
    moved: int = 0

    def pump(self, source: socket.socket, sink: socket.socket, pause: float) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                time.sleep(pause)
                sink.sendall(piece)
                self.moved += len(piece)
            sink.shutdown(socket.SHUT_WR)


async def _beat(line: Line, gaps: list[int]) -> None:
    """How much moved between two turns of the event loop: while the machine stands still, nothing does."""
    last = line.moved
    while True:
        await asyncio.sleep(0.005)
        gaps.append(line.moved - last)
        last = line.moved


@pytest.fixture
def slow_line(postgres_dsn: str) -> Iterator[Line]:
    """To an empty database."""
    line = Line()
    given = conninfo_to_dict(Dsn.parse(postgres_dsn).conninfo)
    host, port = str(given.pop("host")), int(given.pop("port") or 5432)
    is_path = host.startswith("/")
    listener = socket.create_server(("127.0.0.1", 0))
    open_, pumps = [listener], list[threading.Thread]()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX if is_path else socket.AF_INET)
                server.connect(f"{host}/.s.PGSQL.{port}" if is_path else (host, port))
                open_.extend((client, server))
                for ends in ((client, server, 0.006), (server, client, 0.0)):
                    pumps.append(threading.Thread(target=line.pump, args=ends, daemon=True))
                    pumps[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    conninfo = make_conninfo("", **given, host="127.0.0.1", port=listener.getsockname()[1])
    line.dsn = "postgresql://" + query_form(conninfo)
    yield line
    for end in open_:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for thread in (accepting, *pumps):
        thread.join(60)
    for end in open_:
        end.close()


async def test_event_loop_goes_on(slow_line: Line) -> None:
    async with persistence.aopen(slow_line.dsn) as db:
        assert db.checkpointer is not None
        given = {f"large{i}": _pieces(250) for i in range(8)}
        checkpoint, gaps = _checkpoint(**given), list[int]()
        beating = asyncio.create_task(_beat(slow_line, gaps))
        await asyncio.sleep(0)  # it has begun
        await db.checkpointer.aput(_BEFORE, checkpoint, {}, dict.fromkeys(given, "1"))
        assert sum(gaps) > 10_000_000
        assert max(gaps) < sum(gaps) / 2
        beating.cancel()
        found = await db.checkpointer.aget_tuple(_BEFORE)
        assert found is not None
        assert found.checkpoint["channel_values"] == given


@pytest.mark.parametrize("pause", [0.0, 0.01, 0.1])
async def test_large_put_that_is_cancelled_is_done_or_not(postgres_dsn: str, pause: float) -> None:
    given = {"large": _pieces(2_000), "small": 1}
    async with persistence.aopen(f"{postgres_dsn}&pool_min=1&pool_max=1") as db:
        assert db.checkpointer is not None
        for _ in range(3):
            checkpoint = _checkpoint(**given)
            putting = asyncio.create_task(
                db.checkpointer.aput(_BEFORE, checkpoint, {}, dict.fromkeys(given, "1"))
            )
            await asyncio.sleep(pause)
            for _ in range(3):
                putting.cancel()
                await asyncio.sleep(0.005)
            await asyncio.wait([putting])
            found = await db.checkpointer.aget_tuple(_BEFORE)
            assert found is None or found.checkpoint["channel_values"] == given
