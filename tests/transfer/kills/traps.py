"""Places to die: before and after each commit that this process makes, whoever makes it.

Installed in a child process only. Commits are those of SQLite and Postgres, by statement or by the driver's
own calls, statements that commit by themselves, and what makes an archive: a file on disk, a file renamed.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sqlite3
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

_READS = {
    "SELECT",
    "SHOW",
    "SET",
    "BEGIN",
    "PRAGMA",
    "WITH",
    "EXPLAIN",
    "FETCH",
    "DECLARE",
    "CLOSE",
    "ROLLBACK",
}
_COMMITS = {"COMMIT", "END"}


class Trap:
    """Counts the places, and kills this process with ``SIGKILL`` at one of them."""

    def __init__(self, die_at: int | None) -> None:
        self.names: list[str] = []
        self._die_at = die_at
        self._lock = threading.Lock()

    def step(self, name: str) -> None:
        """One place."""
        with self._lock:
            self.names.append(name)
            if len(self.names) == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def around(self, what: str | None) -> Iterator[None]:
        """A commit: one place before it and one after; none where ``what`` is ``None``."""
        if what is not None:
            self.step(f"before {what}")
        yield
        if what is not None:
            self.step(f"after {what}")

    def install(self) -> None:
        """Watch this process from now on."""
        self._install_postgres()
        self._install_sqlite()
        self._install_files()

    def _install_postgres(self) -> None:
        trap = self
        execute = psycopg.Cursor.execute
        exec_command = psycopg.Connection._exec_command

        def traced_execute(cursor: Any, query: Any, *args: Any, **options: Any) -> Any:
            alone = cursor.connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            with trap.around(_commit(query, inside=not alone) if cursor.connection.autocommit else None):
                return execute(cursor, query, *args, **options)

        def traced_command(conn: Any, command: Any, *args: Any, **options: Any) -> Generator[Any, Any, Any]:
            what = "COMMIT" if command == b"COMMIT" else None
            if what is not None:
                trap.step(f"before {what}")
            result = yield from exec_command(conn, command, *args, **options)
            if what is not None:
                trap.step(f"after {what}")
            return result

        psycopg.Cursor.execute = traced_execute  # type: ignore[method-assign,assignment]
        psycopg.Connection._exec_command = traced_command  # type: ignore[method-assign,assignment]

    def _install_sqlite(self) -> None:
        trap = self
        connect = sqlite3.connect

        class Cursor(sqlite3.Cursor):
            def execute(self, sql: str, *args: Any) -> Any:
                with trap.around(_commit(sql, inside=self.connection.in_transaction)):
                    return super().execute(sql, *args)

            def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:  # type: ignore[override]
                with trap.around(_commit(sql, inside=self.connection.in_transaction)):
                    return super().executemany(sql, *args)

            def executescript(self, sql: str) -> Any:
                for statement in _statements(sql):
                    self.execute(statement)
                return self

        class Connection(sqlite3.Connection):
            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                return self.cursor().execute(sql, *args)  # type: ignore[no-any-return]

            def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
                return self.cursor().executemany(sql, *args)  # type: ignore[no-any-return]

            def executescript(self, sql: str) -> sqlite3.Cursor:
                return self.cursor().executescript(sql)  # type: ignore[no-any-return]

            def commit(self) -> None:
                with trap.around("COMMIT" if self.in_transaction else None):
                    super().commit()

        def traced_connect(*args: Any, **options: Any) -> sqlite3.Connection:
            opened: sqlite3.Connection = connect(*args, **{"factory": Connection, **options})
            return opened

        sqlite3.connect = traced_connect  # type: ignore[assignment]

    def _install_files(self) -> None:
        fsync, rename = os.fsync, pathlib.Path.rename

        def traced_fsync(fd: int) -> None:
            with self.around("fsync"):
                fsync(fd)

        def traced_rename(path: pathlib.Path, target: Any) -> pathlib.Path:
            with self.around(f"rename to {pathlib.Path(target).name}"):
                return rename(path, target)

        os.fsync = traced_fsync  # type: ignore[assignment]
        pathlib.Path.rename = traced_rename  # type: ignore[method-assign,assignment]


def _commit(query: object, *, inside: bool) -> str | None:
    """What a statement commits, in a word or two, or ``None`` where it commits nothing."""
    text = query.decode() if isinstance(query, bytes) else query if isinstance(query, str) else str(query)
    words = text.replace("(", " ").split()
    word = words[0].upper() if words else ""
    if word in _COMMITS:
        return word if inside else None
    return None if inside or word in _READS else " ".join(words[:3])


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one, as each commits by itself."""
    text = ""
    for piece in script.split(";"):
        text += piece + ";"
        if sqlite3.complete_statement(text) and text.strip(" \n;"):
            yield text
            text = ""
