"""Several processes and threads that write one SQLite file at the same time."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import Checkpoint

import persistence
from persistence import Settings
from persistence.backends.sqlite.savers import AsyncSqliteSaver, SqliteSaver
from persistence.errors import ClosedError
from persistence.testing.marks import clause

PROCESSES, THREADS, STEPS = 5, 4, 40
_WRITER = """
import json, sys, threading, time
import persistence

path, name, threads, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
errors, longest = [], [0.0]

def write(saver, thread):
    config = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
    try:
        for step in range(steps):
            checkpoint = {"v": 4, "id": f"{step:04}", "ts": "", "channel_values": {"step": step},
                          "channel_versions": {"step": str(step)}, "versions_seen": {}}
            started = time.monotonic()
            config = saver.put(config, checkpoint, {"step": step}, {"step": str(step)})
            saver.put_writes(config, [("step", step), ("other", thread)], "task")
            longest[0] = max(longest[0], time.monotonic() - started)
    except Exception as error:
        errors.append(repr(error))

with persistence.open(f"sqlite:///{path}") as db:
    names = [f"{name}-{n}" for n in range(threads)]
    workers = [threading.Thread(target=write, args=(db.checkpointer, n)) for n in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
print(json.dumps([errors, longest[0]]))
"""


@clause("R7")
def test_processes_that_write_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    with persistence.open(f"sqlite:///{path}"):
        pass
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), f"p{n}", str(THREADS), str(STEPS)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(PROCESSES)
    ]
    answers = [json.loads(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [errors for errors, _ in answers] == [[]] * PROCESSES
    with persistence.open(f"sqlite:///{path}") as db:
        assert db.checkpointer is not None
        for name in (f"p{p}-{t}" for p in range(PROCESSES) for t in range(THREADS)):
            found = list(db.checkpointer.list({"configurable": {"thread_id": name}}))
            assert [one.checkpoint["channel_values"]["step"] for one in found] == [*reversed(range(STEPS))]
            assert all(
                one.pending_writes == [("task", "step", step), ("task", "other", name)]
                for one, step in zip(found, reversed(range(STEPS)), strict=True)
            )


@clause("W6")
def test_a_writer_waits_for_another_process_as_long_as_it_is_told_to(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'chat.db'}"
    with (
        persistence.open(url, settings=Settings(sqlite_busy_timeout=30)) as db,
        persistence.open(url) as other,
    ):
        saver, holder = db.checkpointer, other.checkpointer
        assert isinstance(saver, SqliteSaver)
        assert isinstance(holder, SqliteSaver)
        saver.put(_at("t"), _checkpoint("1"), {}, {})
        held, release = threading.Event(), threading.Event()

        def hold(_: Any) -> None:
            held.set()
            release.wait(30)

        holding = threading.Thread(target=holder._engine.write, args=(hold,))
        waiting = threading.Thread(target=saver.put, args=(_at("t", "1"), _checkpoint("2"), {}, {}))
        holding.start()
        assert held.wait(30)
        waiting.start()
        waiting.join(0.5)  # far longer than one try
        assert waiting.is_alive()
        release.set()
        waiting.join(30)
        holding.join(30)
        found = saver.get_tuple(_at("t"))
        assert found is not None
        assert found.checkpoint["id"] == "2"


async def test_a_large_value_is_let_go_of_when_it_is_stored_or_delivered(tmp_path: Path) -> None:
    class Value(dict[str, Any]):
        """A value that can be watched."""

    async with persistence.aopen(f"sqlite:///{tmp_path / 'chat.db'}") as db:
        saver: Any = db.checkpointer
        results = []

        def work(_: Any) -> Value:
            results.append(weakref.ref(result := Value()))
            return result

        await saver._engine.awrite(work)
        await saver._engine.aread(work)
        assert len(results) == 2
        async with asyncio.timeout(10):
            while any(result() is not None for result in results):  # noqa: ASYNC110 - nothing tells it
                await asyncio.sleep(0.01)


@clause("W6")
async def test_what_the_tasks_of_a_loop_write_in_one_round_shares_a_commit(tmp_path: Path) -> None:
    async with persistence.aopen(f"sqlite:///{tmp_path / 'chat.db'}") as db:
        saver = db.checkpointer
        assert isinstance(saver, AsyncSqliteSaver)
        await asyncio.gather(*(saver.aput(_at(f"t{n}"), _checkpoint("1"), {}, {}) for n in range(100)))
        assert saver.figures() == {"queue_length": 0, "commits": 1, "committed_operations": 100}


@clause("F4")
async def test_what_was_asked_in_the_round_of_the_close_is_answered(tmp_path: Path) -> None:
    async with persistence.aopen(f"sqlite:///{tmp_path / 'chat.db'}") as db:
        saver = db.checkpointer
        assert isinstance(saver, AsyncSqliteSaver)
        await saver.aget_tuple(_at("t"))  # the readers run
        asked = [saver.aput(_at("t"), _checkpoint("1"), {}, {}), saver.aget_tuple(_at("t"))]
        tasks = [asyncio.ensure_future(one) for one in asked]
        asyncio.get_running_loop().call_soon(saver.close)  # before the writer and the readers are woken
        stored, found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert stored == _at("t", "1")
        assert found is None or isinstance(found, ClosedError)
    async with persistence.aopen(f"sqlite:///{tmp_path / 'chat.db'}") as db:
        assert db.checkpointer is not None
        assert await db.checkpointer.aget_tuple(_at("t")) is not None


def _at(thread: str, checkpoint: str | None = None) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": checkpoint}}


def _checkpoint(id_: str) -> Checkpoint:
    return {
        "v": 4,
        "id": id_,
        "ts": "",
        "channel_values": {},
        "channel_versions": {},
        "versions_seen": {},
        "updated_channels": None,
    }
