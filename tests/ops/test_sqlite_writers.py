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
from persistence.backends.sqlite.recent import _MOST_ROWS, Known, Recent
from persistence.backends.sqlite.savers import SqliteSaver
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

with persistence.open(f"sqlite:///{path}?busy_timeout=60") as db:
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
        persistence.open(url, settings=Settings(sqlite_busy_timeout=60)) as db,
        persistence.open(url) as other,
    ):
        saver, holder = db.checkpointer, other.checkpointer
        assert isinstance(saver, SqliteSaver)
        assert isinstance(holder, SqliteSaver)
        saver.put(_at("t"), _checkpoint("1"), {}, {})
        held, release = threading.Event(), threading.Event()

        def hold(_: Any) -> None:
            held.set()
            release.wait(60)

        holding = threading.Thread(target=holder._engine.write, args=(hold,))
        waiting = threading.Thread(target=saver.put, args=(_at("t", "1"), _checkpoint("2"), {}, {}))
        holding.start()
        assert held.wait(60)
        waiting.start()
        waiting.join(0.5)  # far longer than one try
        assert waiting.is_alive()
        release.set()
        waiting.join(60)
        holding.join(60)
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
        async with asyncio.timeout(60):
            while any(result() is not None for result in results):  # noqa: ASYNC110 - nothing tells it
                await asyncio.sleep(0.01)


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


def test_rows_that_are_remembered_are_not_too_many() -> None:
    """Small ones: each takes more than its bytes."""
    recent = Recent()
    for i in range(_MOST_ROWS + 5):
        recent.add(str(i), "", Known("1", {}, {}, 1))
    assert len(recent._rows) == _MOST_ROWS
    assert recent.get("4", "", "1") is None
    assert recent.get("5", "", "1") is not None


_CHAIN: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"topic": ["a"], "title": "t", "log": [1]}, {"topic": "1", "title": "1", "log": "1"}),
    ({"topic": ["a"], "title": "t", "log": [2]}, {"log": "2"}),
    ({"topic": ["a"], "title": "t", "log": [3]}, {"log": "3"}),
    ({"topic": ["changed in place"], "title": "t", "log": [4]}, {"log": "4"}),
    ({"topic": ["a"], "title": "t", "log": bytearray(b"5")}, {"log": "5"}),
    ({"topic": ["a"], "title": "t", "log": [6], "no version": None}, {"log": "6"}),
    ({"topic": ["a"], "title": "t"}, {"log": "7"}),
    ({"topic": ["a"], "title": "t"}, {}),
    ({"topic": ["a"], "title": "t"}, {}),
    ({"topic": ["a"], "title": "t", "log": ["given"]}, {}),
    ({"topic": ["b"], "title": "t", "log": ["not stored"]}, {"topic": "8"}),
    ({"topic": ["b"], "title": "t", "log": ["not stored"]}, {"topic": "9"}),
]


def test_values_that_are_carried_from_row_to_row(tmp_path: Path) -> None:
    """Small rows are put together from the last one's bytes, which another connection may have written."""
    path = f"sqlite:///{tmp_path}/chat.db"
    found = []
    with (
        persistence.open("memory://") as memory,
        persistence.open(path) as ours,
        persistence.open(path) as theirs,
    ):
        for savers in ([memory], [ours], [ours] * 3 + [theirs, ours, ours, theirs, theirs]):
            thread = str(len(savers))
            config = _at(thread)
            versions: dict[str, str] = {}
            states = []
            for step, (values, new) in enumerate(_CHAIN):
                values, new = {**values, "step": step}, {**new, "step": str(step)}
                versions |= new
                checkpoint: Any = {**_checkpoint(f"{step:03}"), "channel_values": {**values}}
                checkpoint["channel_versions"] = dict(versions)
                saver: Any = savers[step % len(savers)].checkpointer
                config = saver.put(config, checkpoint, {"step": step}, new)
                states.append(saver.get_tuple(config).checkpoint["channel_values"])
            found.append(states)
    assert found[0] == found[1] == found[2]
    assert found[0][3]["topic"] == ["a"] and type(found[1][4]["log"]) is bytearray
