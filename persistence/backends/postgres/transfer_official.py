"""LangGraph's own Postgres saver on the snapshot of a transfer's source, in its read-only transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg.rows import tuple_row

from persistence.backends.postgres.markers import is_marker, unmark
from persistence.serializer import make_serializer

if TYPE_CHECKING:
    from langgraph.checkpoint.base import CheckpointTuple
    from psycopg import Connection

    from persistence.settings import Settings

_KEYS = """
SELECT checkpoint_ns, checkpoint_id FROM checkpoints
WHERE thread_id = %s AND
    (%s::text IS NULL OR (checkpoint_ns COLLATE "C", checkpoint_id COLLATE "C") > (%s::text, %s::text))
ORDER BY checkpoint_ns COLLATE "C", checkpoint_id COLLATE "C" LIMIT %s
"""
_INLINE = """
SELECT v.key, v.value FROM checkpoints, jsonb_each(checkpoint -> 'channel_values') v
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s
"""
_PAGE = 1_000


class PostgresOfficial:
    """See :class:`persistence.transfer.semantic.Official`."""

    carries_snapshots = True
    migrates_sends = True

    def __init__(
        self,
        conn: Connection[Any],
        settings: Settings,
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._conn = conn
        self._errors = errors
        self._saver = PostgresSaver(conn, serde=make_serializer(settings))

    def keys(self, thread: str) -> Iterator[tuple[str, str]]:
        """See :class:`persistence.transfer.semantic.Official`."""
        if "\0" in thread:  # which Postgres cannot hold
            return
        ns = checkpoint_id = None
        while True:
            with self._errors():
                cursor = self._conn.cursor(row_factory=tuple_row)
                page = cursor.execute(_KEYS, [thread, ns, ns, checkpoint_id, _PAGE]).fetchall()
            yield from page
            if len(page) < _PAGE:
                return
            ns, checkpoint_id = page[-1]

    def tuple(self, thread: str, ns: str, checkpoint_id: str) -> CheckpointTuple | None:
        """See :class:`persistence.transfer.semantic.Official`."""
        place = {"thread_id": thread, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
        with self._errors():
            found = list(self._saver.list(RunnableConfig(configurable=place)))
        return found[0] if found else None

    def beside(self, thread: str, ns: str, checkpoint_id: str) -> dict[str, list[Any]]:
        """See :class:`persistence.transfer.semantic.Official`: the row's markers, as our savers read them."""
        with self._errors():
            cursor = self._conn.cursor(row_factory=tuple_row)
            rows = cursor.execute(_INLINE, [thread, ns, checkpoint_id]).fetchall()
        marked = [(channel, unmark(held)) for channel, held in rows if is_marker(held)]
        return {
            channel: [] if held is None else [self._saver.serde.loads_typed(held)] for channel, held in marked
        }
