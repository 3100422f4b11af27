"""The store in memory, used by several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import persistence


class Compared:
    """A value that does something while a search looks at it."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then

    def __eq__(self, other: object) -> bool:
        self._then()
        return True

    __hash__ = None  # type: ignore[assignment]


def test_a_search_while_another_thread_writes() -> None:
    """LangGraph's says: dictionary changed size during iteration."""
    with persistence.open("memory://") as db, ThreadPoolExecutor(1) as other:
        store: Any = db.store
        writes: list[Future[None]] = []

        def write() -> None:
            writes.append(other.submit(store.put, ("a",), str(len(writes)), {}))
            wait(writes, timeout=0.2)  # it may have to wait for the search

        store.put(("a",), "first", {"v": Compared(write)})
        store.put(("a",), "second", {"v": 1})
        assert [item.key for item in store.search(("a",), filter={"v": 1})] == ["first", "second"]
        wait(writes)
        assert store.get(("a",), "0") is not None
