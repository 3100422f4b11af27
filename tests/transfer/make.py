"""Checkpoints of any content, put by the official SQLite saver."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint, CheckpointMetadata, empty_checkpoint
from langgraph.checkpoint.sqlite import SqliteSaver


def put(
    saver: BaseCheckpointSaver[Any],
    thread: str,
    values: Mapping[str, Any],
    *,
    versions: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    ns: str = "",
    parent: str | None = None,
    **fields: Any,
) -> str:
    """Store one checkpoint; gives its id."""
    checkpoint = cast(dict[str, Any], empty_checkpoint())
    checkpoint["channel_values"] = dict(values)
    checkpoint["channel_versions"] = dict(versions if versions is not None else dict.fromkeys(values, "1.0"))
    checkpoint |= fields
    configurable = {"thread_id": thread, "checkpoint_ns": ns}
    if parent is not None:
        configurable["checkpoint_id"] = parent
    saver.put(
        cast(RunnableConfig, {"configurable": configurable}),
        cast(Checkpoint, checkpoint),
        cast(CheckpointMetadata, dict(metadata or {"source": "loop", "step": 1})),
        checkpoint["channel_versions"],
    )
    return str(checkpoint["id"])


@contextmanager
def database(path: Path) -> Iterator[SqliteSaver]:
    """An official saver on a file."""
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.setup()
        yield saver


def execute(path: Path, statement: str, *args: object) -> None:
    """Change a database behind the saver's back."""
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(statement, args)
