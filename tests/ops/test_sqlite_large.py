"""Checkpoints that are too large to be put together in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint, CheckpointTuple
from langgraph.checkpoint.sqlite import SqliteSaver

import persistence
from persistence.errors import ConflictError
from tools.benchmarks import child

_MB = 1_000_000
VALUES = {"text": "ä" * 3 * _MB, "data": b"\0\1" * _MB, "small": 1}
META: Any = {"source": "loop", "name": "Ü"}


@pytest.mark.parametrize("save", [
    lambda saver, *args: saver.put(*args),
    lambda saver, *args: asyncio.run(saver.aput(*args)),
])  # fmt: skip
def test_a_large_checkpoint_reads_as_the_official_saver_has_written_it(
    tmp_path: Path, save: Callable[..., Any]
) -> None:
    path = tmp_path / "chat.db"
    with persistence.open(f"sqlite:///{path}") as db:
        assert db.checkpointer is not None
        for values in ({"text": "x" * 9 * _MB}, VALUES):  # the second one replaces the first
            save(db.checkpointer, _at("a"), _checkpoint(values), META, _versions(values))
        ours = _load(db.checkpointer, "a")
    with SqliteSaver.from_conn_string(str(path)) as official:
        official.put(_at("b"), _checkpoint(VALUES), META, _versions(VALUES))
        for found in (ours, _load(official, "a")):
            assert (found.checkpoint, found.metadata) == (_checkpoint(VALUES), META)
        rows = official.conn.execute(
            "SELECT type, length(checkpoint), typeof(checkpoint), typeof(metadata) FROM checkpoints"
        ).fetchall()
    assert rows[0] == rows[1]


async def test_a_large_checkpoint_is_stored_though_another_operation_of_its_group_fails(
    tmp_path: Path,
) -> None:
    async with persistence.aopen(f"sqlite:///{tmp_path / 'chat.db'}") as db:
        assert db.checkpointer is not None
        save = [_at(name) for name in "abc"]
        puts = [db.checkpointer.aput(at, _checkpoint(VALUES), META, _versions(VALUES)) for at in save]
        await puts[0]
        done = await asyncio.gather(
            puts[1], db.checkpointer.acopy_thread("a", "b"), puts[2], return_exceptions=True
        )
        assert isinstance(done[1], ConflictError)
        assert not isinstance(done[0], BaseException)
        assert not isinstance(done[2], BaseException)
        for at in save:
            found = await db.checkpointer.aget_tuple(at)
            assert found is not None
            assert found.checkpoint == _checkpoint(VALUES)


def test_saving_takes_no_more_memory_than_three_times_the_state(tmp_path: Path) -> None:
    state = 40 * _MB
    task = child.Task("save", "sqlite", "async", "ours", str(tmp_path / "chat.db"), state)
    values, _ = child.run(task)
    assert values["save peak MB"] * _MB < 3 * state


def _load(saver: BaseCheckpointSaver[Any], thread: str) -> CheckpointTuple:
    return cast(CheckpointTuple, saver.get_tuple(_at(thread)))


def _at(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def _versions(values: dict[str, Any]) -> Any:
    return dict.fromkeys(values, "1")


def _checkpoint(values: dict[str, Any]) -> Checkpoint:
    return {
        "v": 4,
        "id": "1",
        "ts": "",
        "channel_values": values,
        "channel_versions": _versions(values),
        "versions_seen": {},
        "updated_channels": None,
    }
