"""The store in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from langgraph.store.base import Op, Result
from langgraph.store.memory import InMemoryStore


class MemoryStore(InMemoryStore):
    """LangGraph's store, for several threads: a search there fails while another thread writes."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's."""
        ops = list(ops)
        with self._lock:
            return super().batch(ops)

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As LangGraph's, which waits for nothing without an index."""
        return self.batch(ops)
