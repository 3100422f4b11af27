"""What this process knows of the rows it has stored or read last.

A channel that did not change keeps the value that is stored for its version. To look that up in the
parent's row takes the server longer than all else that ``put`` asks of it. But the parent is nearly
always a row that this saver has just written or read. So it remembers what that row holds, together
with its ``xmin``: the statement that makes use of it does nothing if the row has changed since.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

_MOST = 1000  # rows, of some kilobytes at most: text that is longer goes to the blob table

Key = tuple[str, str, str]
"""Thread, namespace and id of a checkpoint."""


class Where(Enum):
    """Where a version's value is, if not in the row itself."""

    BLOB = "in the blob table"
    NOWHERE = "the blob table says that there is none"


class Fact(NamedTuple):
    """What a row says of one channel."""

    version: str
    value: Any
    """What the row itself holds, as JSON, or :class:`Where`."""


class Row(NamedTuple):
    """What is known of one row."""

    xmin: str
    facts: Mapping[str, Fact]
    """By channel; one that is missing has to be looked up."""


class KnownRows:
    """The rows that were used last. Safe to use from several threads."""

    def __init__(self) -> None:
        self._rows: OrderedDict[Key, tuple[str, Callable[[], Mapping[str, Fact]]]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, key: Key, xmin: str, facts: Callable[[], Mapping[str, Fact]]) -> None:
        """Remember a row; ``facts`` is called when they are needed, which after most reads is never."""
        with self._lock:
            self._rows[key] = (xmin, facts)
            self._rows.move_to_end(key)
            if len(self._rows) > _MOST:
                self._rows.popitem(last=False)

    def get(self, key: Key) -> Row | None:
        """What is known of a row."""
        with self._lock:
            found = self._rows.get(key)
        return Row(found[0], found[1]()) if found else None
