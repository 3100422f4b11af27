"""How connections to one SQLite database are made, and what SQLite's errors become."""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from persistence.backends.moved import MOVED, sealed
from persistence.backends.sqlite.log import Log
from persistence.contract import ServerInfo
from persistence.dsn import Dsn
from persistence.errors import ConnectError, PersistenceError, SchemaError
from persistence.settings import Settings

# The in-memory file system whose databases several connections of one process share.
_MEMDB_SINCE = (3, 36, 0)
_LOCKED_RETRY = 0.01
_SMALLEST_PAGE = 512


class SqliteDatabase:
    """One SQLite database, a file or in memory, and the way to connect to it.

    Every connection has the same settings: write-ahead log, the chosen durability, a bounded wait
    for locks, explicit transactions, and it may be used from any thread (one at a time).
    Safe to use from several threads.
    """

    def __init__(self, dsn: Dsn, settings: Settings) -> None:
        self.path = None if dsn.path is None else Path(dsn.path)
        self.name = dsn.masked
        self._synchronous = settings.sqlite_synchronous
        self.busy_timeout = settings.sqlite_busy_timeout
        self._memory = f"/persistence-{secrets.token_hex(16)}"
        self._anchor: sqlite3.Connection | None = None
        self._users = 0
        self._identity: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Keep a database in memory alive until :meth:`close`; as often as it is held."""
        with self._lock:
            self._users += 1
        if self.path is not None:
            self._identity = _identity(self.path)

    def check_in_place(self) -> None:
        """Raise ``ConnectError`` where the file was removed or replaced since :meth:`hold`.

        SQLite goes on writing into a file that has no name any more, and all of that is lost.
        """
        if self.path is not None and _identity(self.path) != self._identity:
            raise ConnectError(
                f"the file was removed or replaced while it was open: {self.name}",
                hint="restart the application; what it wrote since then is lost",
                transient=False,
            )

    def sizes(self) -> dict[str, int]:
        """Bytes of the file and of the files beside it."""
        if self.path is None:
            return {}
        files = {"database": self.path, "log": Path(f"{self.path}-wal")}
        return {name: file.stat().st_size for name, file in files.items() if file.exists()}

    def connect(self, readonly: bool = False) -> sqlite3.Connection:
        """A new connection; the caller closes it.

        Args:
            readonly: Refuse writes. A file that this process may not write is always opened so.

        Raises:
            ConnectError: The file cannot be opened, or is not a database.
        """
        if self.path is not None:
            return self._connect_file(self.path, readonly)
        with self._lock:
            if self._anchor is None:
                # A database in memory lives as long as somebody is connected to it.
                self._anchor = self._connect_memory(readonly=False)
        return self._connect_memory(readonly)

    def describe(self) -> ServerInfo:
        """The SQLite library that this process runs."""
        return ServerInfo("SQLite", sqlite3.sqlite_version)

    def close(self) -> None:
        """Undo one :meth:`hold`. After the last, a database in memory is gone, and a file stands alone."""
        with self._lock:
            self._users = max(0, self._users - 1)
            if self._users > 0:
                return
            if self._anchor is not None:
                self._anchor.close()
                self._anchor = None
        self.tidy()

    def has_log(self) -> bool:
        """Whether there is a log beside the file: somebody has it open, or left it in a crash."""
        return self.path is not None and Path(f"{self.path}-wal").exists()

    def log(self) -> Log | None:
        """The log to make longer while a connection writes; ``None`` where no commit waits for the disk."""
        waits = self._synchronous in ("full", "extra") and os.name == "posix"
        return Log(self.path) if self.path is not None and waits else None

    def rehearse(self) -> sqlite3.Connection:
        """A connection that may write but changes no setting of the file; the caller closes it."""
        if self.path is None:
            return self.connect()
        return self._open(file_uri(self.path, "rw"))

    def tidy(self) -> None:
        """Leave one file behind, not three.

        The last connection to close empties the log into the file and removes it, unless it could
        only read. Then this one is the last; if somebody else still has the file open, nothing happens.
        """
        if self.path is None or not self.has_log():
            return
        with (
            suppress(sqlite3.Error),  # locked by another process, which will do it
            closing(sqlite3.connect(file_uri(self.path, "rw"), uri=True, timeout=0)) as conn,
        ):
            conn.execute("PRAGMA schema_version")

    def _connect_memory(self, readonly: bool) -> sqlite3.Connection:
        if sqlite3.sqlite_version_info < _MEMDB_SINCE:
            raise ConnectError(
                f"a SQLite database in memory needs SQLite 3.36, this Python has {sqlite3.sqlite_version}",
                hint="use a file (sqlite:///chat.db) or memory://",
                transient=False,
            )
        conn = self._open(f"file:{self._memory}?vfs=memdb")
        if readonly:
            conn.execute("PRAGMA query_only = ON")
        return conn

    def _connect_file(self, path: Path, readonly: bool) -> sqlite3.Connection:
        self.check_path(path)
        readonly = readonly or (path.exists() and not _may(os.W_OK, path))
        conn: sqlite3.Connection | None = None
        try:
            conn = self._open(file_uri(path, "ro" if readonly else "rwc"))
            if readonly:
                conn = self._readable(conn, path)
            else:
                self._use_write_ahead_log(conn)
                conn.execute(f"PRAGMA synchronous = {self._synchronous}")
        except sqlite3.Error as error:
            if conn is not None:
                conn.close()
            raise self._connect_error(error, path) from error
        return conn

    def _readable(self, conn: sqlite3.Connection, path: Path) -> sqlite3.Connection:
        """The connection, once it has read, so that errors come here; or one that reads without a log.

        SQLite makes a file beside one with a write-ahead log even to read it. In a folder where this
        process cannot, it reads only if it is told that nobody writes; a log would say that somebody does.
        """
        try:
            conn.execute("PRAGMA schema_version")
        except sqlite3.OperationalError as error:
            sealed = not _may(os.W_OK, path.absolute().parent) and not Path(f"{path}-wal").exists()
            if error_code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) or not sealed:
                raise
            conn.close()
            conn = self._open(file_uri(path, "ro") + "&immutable=1")
        return conn

    def _open(self, uri: str) -> sqlite3.Connection:
        return sqlite3.connect(
            uri,
            uri=True,
            timeout=self.busy_timeout,
            isolation_level=None,
            check_same_thread=False,
        )

    def _use_write_ahead_log(self, conn: sqlite3.Connection) -> None:
        """Switch the journal mode, which waits for nobody: SQLite has no busy handler here."""
        deadline = time.monotonic() + self.busy_timeout
        while True:
            try:
                conn.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_LOCKED_RETRY)
            else:
                return

    def check_path(self, path: Path) -> None:
        """Find what SQLite would only call "unable to open database file"."""
        try:
            if path.is_dir():
                raise ConnectError(f"not a file but a folder: {path} ({self.name})", transient=False)
            if path.exists() and not path.is_file():
                raise ConnectError(f"not a regular file: {path} ({self.name})", transient=False)
            if path.exists() and 0 < path.stat().st_size < _SMALLEST_PAGE:
                # SQLite takes it for empty and would write over it. Only its size may be looked at:
                # closing a file that SQLite has open, too, gives up SQLite's locks.
                raise ConnectError(f"not a SQLite database: {path}", transient=False)
            if not path.exists() and not path.absolute().parent.is_dir():
                raise ConnectError(
                    f"the folder does not exist: {path.absolute().parent} ({self.name})",
                    hint="make it first, or correct the path: sqlite:///relative, sqlite:////absolute",
                    transient=False,
                )
        except PermissionError as error:
            raise ConnectError(f"no permission to look at {path}: {self.name}", transient=False) from error
        except (ConnectError, FileNotFoundError):  # an OSError, too; or the working directory is gone
            raise
        except OSError as error:  # a name that is too long, links that go round
            raise ConnectError(f"cannot open {path}: {error.strerror}", transient=False) from error

    def _connect_error(self, error: sqlite3.Error, path: Path) -> ConnectError:
        code = error_code(error)
        if code == sqlite3.SQLITE_NOTADB:
            return ConnectError(f"not a SQLite database: {path}", transient=False)
        if code == sqlite3.SQLITE_CANTOPEN and path.exists() and not _may(os.R_OK, path):
            return ConnectError(f"no permission to read {path}", transient=False)
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return ConnectError(
                f"cannot open {path}: {error}",
                hint="SQLite must be allowed to write the file and its folder",
                transient=False,
            )
        return ConnectError(f"cannot open {path}: {error}", transient=code == sqlite3.SQLITE_BUSY)


class translated:  # noqa: N801 - reads as a clause: with translated(where)
    """A block in which SQLite's errors become ours, for both colours.

    A missing table becomes a :class:`SchemaError` that names the command. Other errors, such as
    a violated constraint, pass unchanged.
    """

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        """``where`` is the masked DSN."""
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and (ours := translate(error, self._where)) is not None:
            raise ours from error


def translate(error: BaseException, where: str) -> PersistenceError | None:
    """Our error for one of SQLite's, or ``None`` where it says enough itself."""
    if isinstance(error, sqlite3.OperationalError):
        text = str(error)
        if text.startswith(("no such table", "no such column")) or "has no column named" in text:
            return SchemaError(f"{text}: {where}", hint="make the tables with: persistence setup")
        if text.startswith("attempt to write a readonly database"):
            return ConnectError(f"{where} can only be read", transient=False)
    if isinstance(error, sqlite3.IntegrityError) and str(error).startswith(MOVED):
        return sealed(f"{error}: {where}")
    return None


def _may(mode: int, path: Path) -> bool:
    """Whether this process may do that; as what it acts as, where the system can tell."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def file_uri(path: Path, mode: str) -> str:
    """The URI by which SQLite opens a file, whatever characters its path has."""
    return f"file://{quote(str(path.absolute()))}?mode={mode}"


def error_code(error: sqlite3.Error) -> int | None:
    """The primary result code; absent where the module itself raised, not SQLite."""
    extended: int | None = getattr(error, "sqlite_errorcode", None)
    return None if extended is None else extended & 0xFF
