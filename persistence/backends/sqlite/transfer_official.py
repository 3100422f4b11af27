"""LangGraph's own SQLite saver on the snapshot of a transfer's source: it makes no tables, writes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver

from persistence.errors import SourceError
from persistence.serializer import make_serializer

if TYPE_CHECKING:
    from langgraph.checkpoint.base import CheckpointTuple

    from persistence.settings import Settings


class SqliteOfficial:
    """See :class:`persistence.transfer.semantic.Official`."""

    carries_snapshots = False
    migrates_sends = False

    def __init__(self, conn: sqlite3.Connection, settings: Settings, label: str, *, task_path: bool) -> None:
        self._conn = conn
        self._label = label
        self._saver = SqliteSaver(conn, serde=make_serializer(settings))
        # Otherwise it would switch the journal mode and make tables.
        self._saver.is_setup = True
        self._saver._has_task_path = task_path

    def keys(self, thread: str) -> Iterator[tuple[str, str]]:
        """See :class:`persistence.transfer.semantic.Official`."""
        try:
            rows = self._conn.execute(
                "SELECT checkpoint_ns, checkpoint_id FROM checkpoints WHERE thread_id = ? ORDER BY 1, 2",
                (thread,),
            )
            yield from chain(rows)  # not from the cursor, which that would close after its connection
        except sqlite3.Error as error:
            raise SourceError(f"cannot read {self._label}: {error}") from None

    def tuple(self, thread: str, ns: str, checkpoint_id: str) -> CheckpointTuple | None:
        """See :class:`persistence.transfer.semantic.Official`."""
        place = {"thread_id": thread, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
        try:
            found = list(self._saver.list(RunnableConfig(configurable=place)))
        except sqlite3.Error as error:
            raise SourceError(f"cannot read {self._label}: {error}") from None
        return found[0] if found else None

    def beside(self, thread: str, ns: str, checkpoint_id: str) -> dict[str, list[Any]]:
        """See :class:`persistence.transfer.semantic.Official`; a row has a place for everything."""
        return {}
