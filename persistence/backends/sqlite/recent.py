"""The channel values of the checkpoints that were written last, as they lie in their rows.

A graph's next checkpoint keeps most channels of the last one. Without this memory each ``put`` would
serialise them again, and then read the parent's row back to take what is stored for their versions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from persistence.backends.sqlite.codec import EMPTY_MAP, LARGE_ROW, split
from persistence.rules import Put

_MOST_BYTES = 32 << 20
_MOST_ROWS = 10_000  # what each takes beside its bytes is a kilobyte


@dataclass(slots=True)
class Known:
    """What a row holds."""

    id: str
    versions: Mapping[str, str]
    """Of each channel that has one."""
    values: Mapping[str, bytes]
    """Of each channel that has one and is not in ``together``, in the form that goes into a row."""
    size: int
    together: bytes = EMPTY_MAP
    """Further values, as one map: taken apart when one of them is asked for."""
    names: AbstractSet[str] = frozenset()
    """The channels that may be in it."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """The channels whose values the row has from its parent, with their versions."""
    carried: bytes = b""
    """If these are all of ``values``: they with their names, as they lie in the row."""
    _apart: Mapping[str, bytes] | None = None

    def stored(self, put: Put) -> tuple[dict[str, bytes], bool]:
        """The values of the channels that keep theirs in ``put``; and whether all of these are known."""
        found: dict[str, bytes] = {}
        is_complete = True
        for channel, version in put.kept.items():
            if self.versions.get(channel) != version:
                is_complete = False
                continue
            if channel in self.names and self._apart is None:
                self._apart = {**self.values, **split(self.together)}
            values = self._apart if channel in self.names else self.values
            if values and channel in values:
                found[channel] = values[channel]
        return found, is_complete


class Recent:
    """The last row of each namespace, forgotten when anything else is written.

    It is looked at from any thread. All else happens on the connection for writing, by whoever may use it.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Known] = {}
        self._bytes = 0
        self._data_version: int | None = None
        self._is_checked = False

    def begin(self) -> None:
        """A transaction begins: others may have written since the last one."""
        self._is_checked = False

    def get(self, thread: str, ns: str, id_: str | None) -> Known | None:
        """What was known of a checkpoint a moment ago; :meth:`holds` says whether it is still true."""
        found = self._rows.get((thread, ns))
        return found if found is not None and found.id == id_ else None

    def holds(self, conn: sqlite3.Connection, thread: str, ns: str, known: Known | None) -> bool:
        """Whether a row is still as :meth:`get` said; to be asked before each write of a checkpoint.

        Until it is added again, the namespace's row is forgotten: it may be about to be replaced.
        """
        if known is not None and not self._is_checked:
            # https://sqlite.org/pragma.html#pragma_data_version: it changes when another connection commits.
            (version,) = conn.execute("PRAGMA data_version").fetchone()
            if version != self._data_version:
                self.clear()
                self._data_version = version
            self._is_checked = True
        return self._forget(thread, ns) is known is not None

    def add(self, thread: str, ns: str, known: Known) -> None:
        """Remember a row that was written."""
        if known.size > LARGE_ROW:
            return
        self._rows[thread, ns] = known
        self._bytes += known.size
        while self._bytes > _MOST_BYTES or len(self._rows) > _MOST_ROWS:
            self._forget(*next(iter(self._rows)))

    def clear(self) -> None:
        """Forget everything: rows were deleted, or something went wrong."""
        self._rows.clear()
        self._bytes = 0

    def _forget(self, thread: str, ns: str) -> Known | None:
        known = self._rows.pop((thread, ns), None)
        self._bytes -= known.size if known else 0
        return known
