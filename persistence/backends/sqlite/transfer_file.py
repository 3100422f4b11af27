"""A SQLite file that is only read: looked at, opened for one snapshot, watched for changes."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from persistence.errors import SourceError

_WAL_VERSION = b"\x02\x02"  # bytes 18 and 19 of the file header: sqlite.org/fileformat2.html
_MAGIC = b"SQLite format 3\0"


def require_file(path: Path, label: str) -> None:
    """Raise ``SourceError`` where there is no SQLite file to read."""
    try:
        if path.is_dir():
            raise SourceError(f"{label} is a directory, not a SQLite file")
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise SourceError(f"{label} is not a regular file")
        if _beside(path, "-wal").exists():
            # This process may have it open, and closing a file gives up all locks that the process has on
            # it, SQLite's too. SQLite will say itself if this is no database.
            path.stat()
            return
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise SourceError(f"{label} does not exist") from None
    except OSError as error:
        raise SourceError(f"cannot read {label}: {error.strerror}") from None
    if head and head != _MAGIC:
        raise SourceError(f"{label} is not a SQLite database")


def place_of(path: Path) -> str:
    """Which file this is, whatever its name."""
    stat = path.stat()
    return f"sqlite:{stat.st_dev}:{stat.st_ino}"


def is_idle_wal(path: Path) -> bool:
    """A database in WAL mode that nobody has open.

    Opening such a file leaves ``-wal`` and ``-shm`` files behind, even for reading, unless SQLite is told
    that the file will not change. It might, so :class:`Unlocked` looks whether it did.
    """
    if _beside(path, "-wal").exists():
        return False
    with path.open("rb") as file:
        return file.read(20)[18:20] == _WAL_VERSION


class Unlocked:
    """Notices a change of a file that is read without a lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seen = self._look()

    def _look(self) -> Mapping[str, object]:
        stat = self._path.stat()
        wal = _beside(self._path, "-wal")
        return {
            "file": (stat.st_ino, stat.st_size, stat.st_mtime_ns),
            "wal": wal.exists() and wal.stat().st_size > 0,
        }

    def changed(self) -> bool:
        """Whether somebody wrote to it since."""
        return self._look() != self.seen


def open_snapshot(path: Path, stack: ExitStack, label: str, *, immutable: bool) -> sqlite3.Connection:
    """A read-only connection that sees one snapshot, closed with ``stack``; of a copy where it must be."""
    try:
        return _begin(path, stack, immutable=immutable)
    except sqlite3.OperationalError as error:
        # A crashed writer left a journal, and this is not a place where SQLite may clean up after it.
        journals = [side for side in ("-wal", "-journal") if _beside(path, side).exists()]
        if not journals:
            raise SourceError(f"cannot read {label}: {error}") from None
    except sqlite3.DatabaseError as error:
        raise SourceError(f"{label} is not a SQLite database: {error}") from None
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persistence-")))
        for name in (path, *(_beside(path, side) for side in journals)):
            shutil.copyfile(name, folder / name.name)
        return _begin(folder / path.name, stack, immutable=False, mode="rw")
    except (sqlite3.Error, OSError) as error:
        raise SourceError(f"cannot read {label}: {error}") from None


def _begin(path: Path, stack: ExitStack, *, immutable: bool, mode: str = "ro") -> sqlite3.Connection:
    options = f"mode={mode}" + ("&immutable=1" if immutable else "")
    conn = sqlite3.connect(
        f"file://{quote(str(path.absolute()))}?{options}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=30,
    )
    try:
        conn.execute("PRAGMA query_only = ON")
        conn.execute("BEGIN")
        # The snapshot begins with the first read, not with BEGIN.
        conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        conn.close()
        raise
    stack.callback(conn.close)
    return conn


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
