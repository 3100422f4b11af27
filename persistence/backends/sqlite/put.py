"""One ``put`` on SQLite: what it stores of the channels that keep their value, and when that is known."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from persistence import rules
from persistence.backends.sqlite import sql
from persistence.backends.sqlite.codec import EMPTY_MAP, LARGE_ROW, Codec, Sealed, items
from persistence.backends.sqlite.recent import Known, Recent
from persistence.metrics import Meter

# Bytes of a checkpoint after which the next one's new values are serialised by one call.
_SMALL = 1 << 16


class PutWork:
    """Stores a checkpoint. What the caller gave is serialised when this is made; it may run twice.

    But a value that is stored for its version is neither looked at nor serialised. It is known if the
    parent is a row that was written a moment ago; else the parent is read.
    """

    __slots__ = (
        "_carried",
        "_codec",
        "_given",
        "_known",
        "_meter",
        "_put",
        "_recent",
        "_row",
        "_together",
        "_unread",
        "_values",
    )

    def __init__(self, put: rules.Put, codec: Codec, recent: Recent, meter: Meter | None) -> None:
        self._put = put
        self._meter = meter
        self._codec = codec
        self._recent = recent
        known = self._known = recent.get(put.thread, put.ns, put.parent) if codec.in_bytes else None
        self._given: dict[str, Any] = {}
        self._unread: dict[str, Any] = {}
        self._values: Mapping[str, Any] = {}
        self._together = EMPTY_MAP
        self._carried = b""
        self._row: Sealed | None = None
        if known is None or not self._carry(known):
            self._gather(known)
        put.given.clear()  # they may change from now on

    def __call__(self, conn: sqlite3.Connection) -> None:
        """Store it, on the connection for writing."""
        put, values, row = self._put, self._values, self._row
        is_true = self._recent.holds(conn, put.thread, put.ns, self._known)
        if row is None or (put.kept and not is_true):
            stored = sql.stored(conn, put, self._codec)
            unread = {channel: value for channel, value in self._unread.items() if channel not in stored}
            values = self._given | {c: self._codec.given(value) for c, value in unread.items()} | stored
            row, self._carried = self._codec.seal(put, values, self._together), b""
        sql.put(conn, put, row)
        if self._meter is not None:
            self._meter.checkpoint((put.thread, put.ns, put.id), row.size)
        if self._codec.in_bytes:
            known = Known(
                put.id, put.versions, values, row.size, self._together, put.own, put.kept, self._carried
            )
            self._recent.add(put.thread, put.ns, known)

    def _carry(self, known: Known) -> bool:
        """Whether the row is as most are, few new values and the rest carried over; then it is made."""
        put = self._put
        if known.size > _SMALL or not known.carried or known.kept != put.kept:
            return False
        unread = put.given
        own = {channel: unread.pop(channel) for channel in put.own if channel in unread}
        together = self._codec.together(own) if unread.keys() <= known.values.keys() else None
        if together is None:
            unread.update(own)
            return False
        put.given = {}
        self._unread, self._values = unread, known.values
        self._together, self._carried = together, known.carried
        self._row = self._codec.carry(put, together, known.carried, len(known.values))
        return True

    def _gather(self, known: Known | None) -> None:
        """Serialise what is new, and look up the rest as far as it is known."""
        put = self._put
        stored: dict[str, bytes] = {}
        is_complete = not put.kept
        if known is not None:
            stored, is_complete = known.stored(put)
        self._serialise(stored, known is not None and known.size <= _SMALL)
        self._values = self._given | stored
        if not is_complete or not self._unread.keys() <= stored.keys():
            return
        if self._together != EMPTY_MAP and not self._given:
            self._carried = items(stored)
        if self._carried:
            self._row = self._codec.carry(put, self._together, self._carried, len(stored))
        else:
            self._row = self._codec.seal(put, self._values, self._together)
        if not put.kept and self._row.size > LARGE_ROW:
            self._given = self._values = {}  # their bytes are in the row, and will not be remembered

    def _serialise(self, stored: Mapping[str, bytes], is_small: bool) -> None:
        """The values that are needed, or may be; the others go to ``_unread``."""
        put, codec = self._put, self._codec
        one_by_one = put.given
        if is_small:
            own = {channel: value for channel, value in put.given.items() if channel in put.own}
            if own and (together := codec.together(own)) is not None:
                self._together = together
                one_by_one = {channel: value for channel, value in put.given.items() if channel not in own}
        for channel, value in one_by_one.items():
            if channel in stored:
                self._unread[channel] = value
                continue
            try:
                self._given[channel] = codec.given(value)
            except Exception:
                if channel in put.own:
                    raise
                self._unread[channel] = value  # refused by the serializer: once more, if it is needed
