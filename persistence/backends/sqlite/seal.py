"""Triggers in a SQLite file that is moved while it is written to.

The *watch* notes threads with a row that was changed in place or deleted, which a look at the keys may not
show. It is there for the minutes of a cut-over. An insert fires no trigger, nor does one that replaces a
row: so most of what savers write costs nothing. Of a store it notes every item that is written, for an item
has but one row, and what was noted is all that is looked at under the lock.

The *seal* refuses every write from then on, so that an application that still runs fails instead of
writing where nobody will look. That a read puts off when an item expires is no write: it is left undone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from persistence.backends.moved import moved_to
from persistence.errors import TransferError

NOTES = "persistence_changed"
_SEAL = "persistence_sealed_"
_WATCH = "persistence_watch_"
_TABLES = ("checkpoints", "writes")
ITEM_NOTES = "persistence_changed_items"
_STORE = ("store", "store_vectors")
_ROWS_OF = {"INSERT": ("new",), "UPDATE": ("old", "new"), "DELETE": ("old",)}
_EVENTS = tuple(_ROWS_OF)
_TRIGGERS = r"SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE ? ESCAPE '\'"


def seal(conn: sqlite3.Connection, target: str) -> None:
    """Refuse writes to the tables of LangGraph's savers, inside the transaction that is open."""
    for table in _TABLES:
        _seal(conn, table, target)


def seal_store(conn: sqlite3.Connection, target: str) -> None:
    """As :func:`seal`, for the tables of LangGraph's store that are there."""
    for table in _there(conn, _STORE):
        columns = [row[1] for row in conn.execute(f"PRAGMA table_info({table})") if row[1] != "expires_at"]
        same = " AND ".join(f'new."{column}" IS old."{column}"' for column in columns)
        _seal(conn, table, target, f"WHEN NOT ({same})")
        if table == "store":
            conn.execute(
                f"CREATE TRIGGER {_SEAL}{table}_read BEFORE UPDATE ON {table} WHEN {same}"
                " BEGIN SELECT RAISE(IGNORE); END"
            )


def _seal(conn: sqlite3.Connection, table: str, target: str, updates: str = "") -> None:
    _drop(conn, f"{_SEAL}{table}_")
    message = moved_to(target).replace("'", "''")
    for event in _EVENTS:
        conn.execute(
            f"CREATE TRIGGER {_SEAL}{table}_{event.lower()} BEFORE {event} ON {table}"
            f" {updates if event == 'UPDATE' else ''} BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )


def unseal(conn: sqlite3.Connection) -> bool:
    """Undo :func:`seal`; whether there was anything to undo."""
    return _drop(conn, _SEAL)


def is_sealed(conn: sqlite3.Connection) -> bool:
    """Whether writes are refused."""
    return bool(_named(conn, _SEAL))


def watch(conn: sqlite3.Connection) -> None:
    """Begin to note changes, inside the transaction that is open; sealed tables need none."""
    unwatch(conn)
    if _named(conn, f"{_SEAL}checkpoints_"):
        return
    conn.execute(f"CREATE TABLE {NOTES} (n INTEGER PRIMARY KEY, thread_id TEXT)")
    for table in _TABLES:
        for event, threads in (("UPDATE", "(old.thread_id), (new.thread_id)"), ("DELETE", "(old.thread_id)")):
            conn.execute(
                f"CREATE TRIGGER {_WATCH}{table}_{event.lower()} AFTER {event} ON {table}"
                f" BEGIN INSERT INTO {NOTES} (thread_id) VALUES {threads}; END"
            )


def watch_store(conn: sqlite3.Connection) -> None:
    """Begin to note items, inside the transaction that is open; a sealed store needs none."""
    if _store_is_sealed(conn):
        return
    conn.execute(f"DROP TABLE IF EXISTS {ITEM_NOTES}")
    conn.execute(f"CREATE TABLE {ITEM_NOTES} (n INTEGER PRIMARY KEY, prefix TEXT, key TEXT)")
    for table in _there(conn, _STORE):
        _drop(conn, f"{_WATCH}{table}_")
        for event in _EVENTS:
            rows = [f"({row}.prefix, {row}.key)" for row in _ROWS_OF[event]]
            conn.execute(
                f"CREATE TRIGGER {_WATCH}{table}_{event.lower()} AFTER {event} ON {table}"
                f" BEGIN INSERT INTO {ITEM_NOTES} (prefix, key) VALUES {', '.join(rows)}; END"
            )


def unwatch(conn: sqlite3.Connection) -> None:
    """Undo :func:`watch` and :func:`watch_store`."""
    _drop(conn, _WATCH)
    conn.execute(f"DROP TABLE IF EXISTS {NOTES}")
    conn.execute(f"DROP TABLE IF EXISTS {ITEM_NOTES}")


def noted(conn: sqlite3.Connection, after: int) -> tuple[set[str], int]:
    """The threads noted since, and the number of the last note."""
    if not _named(conn, f"{_WATCH}checkpoints_"):
        return set(), after
    rows = conn.execute(f"SELECT n, thread_id FROM {NOTES} WHERE n > ?", (after,)).fetchall()
    return {thread for _, thread in rows}, max((n for n, _ in rows), default=after)


def noted_items(conn: sqlite3.Connection, after: int, label: str) -> tuple[set[tuple[str, str]], int]:
    """The items noted since, and the number of the last note.

    Raises:
        TransferError: Tables of the store were made since the watch began.
    """
    if _store_is_sealed(conn):
        return set(), after
    needed = {f"{_WATCH}{table}_{event.lower()}" for table in _there(conn, _STORE) for event in _EVENTS}
    if not needed.issubset(_named(conn, _WATCH)):
        raise TransferError(
            f"the store of {label} was set up during the cut-over",
            hint="it was not cut over, and its application goes on; run the command again",
        )
    rows = conn.execute(f"SELECT n, prefix, key FROM {ITEM_NOTES} WHERE n > ?", (after,)).fetchall()
    return {(prefix, key) for _, prefix, key in rows}, max((n for n, *_ in rows), default=after)


def _store_is_sealed(conn: sqlite3.Connection) -> bool:
    return bool(_named(conn, f"{_SEAL}store_"))


def _there(conn: sqlite3.Connection, tables: Sequence[str]) -> list[str]:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return [table for table in tables if conn.execute(query, (table,)).fetchone()]


def _named(conn: sqlite3.Connection, prefix: str) -> list[str]:
    pattern = prefix.replace("_", r"\_") + "%"
    return [name for (name,) in conn.execute(_TRIGGERS, (pattern,))]


def _drop(conn: sqlite3.Connection, prefix: str) -> bool:
    names = _named(conn, prefix)
    for name in names:
        conn.execute(f"DROP TRIGGER {name}")
    return bool(names)
