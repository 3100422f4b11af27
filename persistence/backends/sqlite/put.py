"""One ``put`` on SQLite: what it stores of the channels that keep their value, and when that is known."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from persistence import rules
from persistence.backends.sqlite import sql
from persistence.backends.sqlite.codec import LARGE_ROW, Codec
from persistence.backends.sqlite.recent import Known, Recent
from persistence.metrics import Meter


class PutWork:
    """Stores a checkpoint. What the caller gave is serialised when this is made; it may run twice.

    But a value that is stored for its version is neither looked at nor serialised. It is known if the
    parent is a row that was written a moment ago; else the parent is read.
    """

    __slots__ = ("_codec", "_given", "_known", "_meter", "_put", "_recent", "_row", "_unread", "_values")

    def __init__(self, put: rules.Put, codec: Codec, recent: Recent, meter: Meter | None) -> None:
        self._put = put
        self._meter = meter
        self._codec = codec
        self._recent = recent
        self._known = recent.get(put.thread, put.ns, put.parent) if put.kept and codec.in_bytes else None
        stored: dict[str, bytes] = {}
        is_complete = not put.kept
        if known := self._known:
            named = [channel for channel in put.kept if known.versions.get(channel) == put.versions[channel]]
            stored = {channel: known.values[channel] for channel in named if channel in known.values}
            is_complete = len(named) == len(put.kept)
        self._unread: dict[str, Any] = {}
        self._given = self._serialised(stored)
        self._values: Mapping[str, Any] = self._given | stored
        is_complete = is_complete and self._unread.keys() <= stored.keys()
        self._row = codec.seal(put, self._values) if is_complete else None
        if self._row and not put.kept and self._row.size > LARGE_ROW:
            self._given = self._values = {}  # their bytes are in the row, and will not be remembered

    def __call__(self, conn: sqlite3.Connection) -> None:
        """Store it, on the connection for writing."""
        put, values, row = self._put, self._values, self._row
        is_true = self._recent.holds(conn, put.thread, put.ns, self._known)
        if row is None or (put.kept and not is_true):
            stored = sql.stored(conn, put, self._codec)
            unread = {channel: value for channel, value in self._unread.items() if channel not in stored}
            values = self._given | {c: self._codec.given(value) for c, value in unread.items()} | stored
            row = self._codec.seal(put, values)
        sql.put(conn, put, row)
        if self._meter is not None:
            self._meter.checkpoint((put.thread, put.ns, put.id), row.size)
        if self._codec.in_bytes:
            self._recent.add(put.thread, put.ns, Known(put.id, put.versions, values, row.size))

    def _serialised(self, stored: Mapping[str, bytes]) -> dict[str, Any]:
        """The values that are needed, or may be; the others go to ``_unread``."""
        given: dict[str, Any] = {}
        for channel, value in self._put.given.items():
            if channel in stored:
                self._unread[channel] = value
                continue
            try:
                given[channel] = self._codec.given(value)
            except Exception:
                if channel in self._put.own:
                    raise
                self._unread[channel] = value  # refused by the serializer: once more, if it is needed
        self._put.given.clear()  # they may change from now on
        return given
