"""Has Python look for cycles of garbage less often while records pass, which are many and in no cycle."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 50_000
"""More than the records of the batches in hand have; Python's default is 700."""
_lock = threading.Lock()
_blocks = 0
_before: tuple[int, int, int] = gc.get_threshold()


@contextmanager
def rarely_collected() -> Iterator[None]:
    """A block in which the collector begins after so many new objects; several may be open at once.

    It collects for the whole process, so it is never turned off: others may make cycles meanwhile.
    """
    global _blocks, _before
    with _lock:
        if _blocks == 0:
            _before = gc.get_threshold()
            if 0 < _before[0] < _OBJECTS:
                gc.set_threshold(_OBJECTS, *_before[1:])
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                gc.set_threshold(*_before)
