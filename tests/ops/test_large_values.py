"""Large values on Postgres: nothing of them stays in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from langgraph.checkpoint.base import empty_checkpoint

import persistence

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
