"""One look at an open SQLite database: a row is written and read, and sizes are taken."""

from __future__ import annotations

import sqlite3
import time

from persistence.backends.moved import sealed
from persistence.backends.sqlite.connection import SqliteDatabase
from persistence.backends.sqlite.engine import Engine
from persistence.backends.sqlite.seal import is_sealed
from persistence.contract import Probe
from persistence.errors import ConnectError, PersistenceError

_WRITE = (
    "INSERT INTO persistence_canary (id, beat) VALUES (1, ?) "
    "ON CONFLICT (id) DO UPDATE SET beat = excluded.beat"
)
_READ = "SELECT beat FROM persistence_canary WHERE id = 1"


def probe(database: SqliteDatabase, engine: Engine, timeout: float) -> Probe:
    """Look by way of the engine's writer and readers, for at most ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    failures: list[Exception] = []
    write_seconds = read_seconds = None
    try:
        database.check_in_place()
        begin = time.perf_counter()
        engine.write_within(_write, timeout)
        write_seconds = time.perf_counter() - begin
    except (sqlite3.Error, PersistenceError, TimeoutError) as error:
        failures.append(error)
    try:
        begin = time.perf_counter()
        engine.read_within(_read, max(0.0, deadline - time.monotonic()))
        read_seconds = time.perf_counter() - begin
    except (sqlite3.Error, PersistenceError, TimeoutError) as error:
        failures.append(error)
    return Probe(
        server=database.describe(),
        read_seconds=read_seconds,
        write_seconds=write_seconds,
        storage=database.sizes(),
        error=_ours(failures[0], database.name, timeout) if failures else None,
    )


def _write(conn: sqlite3.Connection) -> None:
    if is_sealed(conn):  # the canary has a table of its own
        raise sealed()
    conn.execute(_WRITE, (str(time.time()),))


def _read(conn: sqlite3.Connection) -> None:
    conn.execute(_READ).fetchall()


def _ours(error: Exception, where: str, timeout: float) -> Exception:
    if isinstance(error, TimeoutError):
        return ConnectError(
            f"no write was possible within {round(timeout, 1):g} s: {where}",
            hint="another process holds the write lock, or the disk hangs",
        )
    return error if isinstance(error, PersistenceError) else PersistenceError(f"{error}: {where}")
