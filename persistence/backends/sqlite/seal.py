"""Triggers in a SQLite file that is moved while it is written to.

The *watch* notes threads with a row that was changed in place or deleted, which a look at the keys may not
show. It is there for the minutes of a cut-over. An insert fires no trigger, nor does one that replaces a
row: so most of what savers write costs nothing.

The *seal* refuses every write from then on, so that an application that still runs fails instead of
writing where nobody will look.
"""

from __future__ import annotations

import sqlite3

from persistence.backends.moved import moved_to

NOTES = "persistence_changed"
_SEAL = "persistence_sealed_"
_WATCH = "persistence_watch_"
_TABLES = ("checkpoints", "writes")
_TRIGGERS = r"SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE ? ESCAPE '\'"


def seal(conn: sqlite3.Connection, target: str) -> None:
    """Refuse writes to LangGraph's tables, inside the transaction that is open."""
    unseal(conn)
    message = moved_to(target).replace("'", "''")
    for table in _TABLES:
        for event in ("INSERT", "UPDATE", "DELETE"):
            conn.execute(
                f"CREATE TRIGGER {_SEAL}{table}_{event.lower()} BEFORE {event} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, '{message}'); END"
            )


def unseal(conn: sqlite3.Connection) -> bool:
    """Undo :func:`seal`; whether there was anything to undo."""
    return _drop(conn, _SEAL)


def is_sealed(conn: sqlite3.Connection) -> bool:
    """Whether writes are refused."""
    return bool(_named(conn, _SEAL))


def watch(conn: sqlite3.Connection) -> None:
    """Begin to note changes, inside the transaction that is open."""
    unwatch(conn)
    conn.execute(f"CREATE TABLE {NOTES} (n INTEGER PRIMARY KEY, thread_id TEXT)")
    for table in _TABLES:
        for event, threads in (("UPDATE", "(old.thread_id), (new.thread_id)"), ("DELETE", "(old.thread_id)")):
            conn.execute(
                f"CREATE TRIGGER {_WATCH}{table}_{event.lower()} AFTER {event} ON {table}"
                f" BEGIN INSERT INTO {NOTES} (thread_id) VALUES {threads}; END"
            )


def unwatch(conn: sqlite3.Connection) -> None:
    """Undo :func:`watch`."""
    _drop(conn, _WATCH)
    conn.execute(f"DROP TABLE IF EXISTS {NOTES}")


def noted(conn: sqlite3.Connection, after: int) -> tuple[set[str], int]:
    """The threads noted since, and the number of the last note."""
    if not _named(conn, _WATCH):
        return set(), after
    rows = conn.execute(f"SELECT n, thread_id FROM {NOTES} WHERE n > ?", (after,)).fetchall()
    return {thread for _, thread in rows}, max((n for n, _ in rows), default=after)


def _named(conn: sqlite3.Connection, prefix: str) -> list[str]:
    pattern = prefix.replace("_", r"\_") + "%"
    return [name for (name,) in conn.execute(_TRIGGERS, (pattern,))]


def _drop(conn: sqlite3.Connection, prefix: str) -> bool:
    names = _named(conn, prefix)
    for name in names:
        conn.execute(f"DROP TRIGGER {name}")
    return bool(names)
