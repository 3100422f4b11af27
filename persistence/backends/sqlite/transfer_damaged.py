r"""Text in a SQLite file that is not UTF-8: damaged, or written by a program that does not mind.

Python's ``sqlite3`` refuses to read it, and no other side of a transfer could hold it. Such a row becomes a
:class:`Reject`, and a thread whose own id is not UTF-8 gets a name, with ``\xff`` for a bad byte. Only rows
that ``sqlite3`` has refused are read in another way, so all others are read at full speed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import msgspec

from persistence.transfer.records import Reject

T = TypeVar("T")
Row = tuple[Any, ...]


class Damaged(bytes):
    """Text that is not UTF-8."""


def readable(
    conn: sqlite3.Connection, rows: sqlite3.Cursor, instead: Callable[[Sequence[str], Row], T]
) -> Iterator[Any | T]:
    """The rows of a query, in order.

    Args:
        conn: Whose query it is.
        rows: The query.
        instead: Makes what takes the place of a row with :class:`Damaged` text, of its columns' names and it.
    """
    while True:
        try:
            # Not from the cursor: that would close it, perhaps after its connection.
            yield from chain(rows)
            return
        except sqlite3.OperationalError as error:
            if "Could not decode to UTF-8" not in str(error):
                raise
            refused = _again(conn, rows)
            if not any(isinstance(value, Damaged) for value in refused):
                raise  # another Python went on to another row
        yield instead([name for name, *_ in rows.description], refused)


def _again(conn: sqlite3.Connection, rows: sqlite3.Cursor) -> Row:
    """The row that was refused: the cursor has not gone on."""
    conn.text_factory = _text
    try:
        row: Row = next(rows, ())
    finally:
        conn.text_factory = str
    return row


def _text(stored: bytes) -> str | Damaged:
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return Damaged(stored)


def rejected(columns: Sequence[str], row: Row) -> Reject:
    """A row of checkpoints or writes, which begins with thread, namespace and checkpoint."""
    bad = [name for name, value in zip(columns, row, strict=True) if isinstance(value, Damaged)]
    raw = [bytes(value) if isinstance(value, Damaged) else value for value in row]
    reason = f"text that is not UTF-8 in {', '.join(bad)}"
    thread, ns, checkpoint_id = map(named, row[:3])
    return Reject(thread, ns, checkpoint_id, reason, msgspec.msgpack.encode(raw))


def named(value: Any) -> Any:
    """What messages call a text; what is no such text is as it was."""
    return value.decode(errors="backslashreplace") if isinstance(value, Damaged) else value


def nameless(conn: sqlite3.Connection, threads: str) -> Mapping[str, Sequence[bytes]]:
    """The ids that are not UTF-8 among those of a query, by what they are called."""
    found: dict[str, list[bytes]] = {}
    for (thread,) in readable(conn, conn.execute(threads), lambda _, row: row):
        if isinstance(thread, Damaged):
            found.setdefault(named(thread), []).append(bytes(thread))
    return found
