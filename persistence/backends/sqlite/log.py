"""The write-ahead log, made longer ahead of the commits that will need it.

A commit that makes a file longer waits for the disk twice: for its bytes, and for the file system to note
the new length. One that overwrites waits once. SQLite overwrites as soon as it begins its log anew, after
1,000 pages; a short run never gets there, and each of its commits takes twice as long.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# Each time by as much as there is, within these bounds: few bytes for few commits.
_LEAST, _MOST = 1 << 16, 1 << 18
_TAIL = 64
# As long as the log gets before SQLite begins it anew.
_ENOUGH = 1000 * 4096


class Log:
    """The log of a database that a connection has open for writing.

    Zeros at its end change nothing: no frame of a log has the page number 0, so SQLite takes them for its
    end, and writes over them. They are appended, wherever the end is by then, so they can never replace
    anything; and a connection holds no lock on this file that closing it here could give up.
    """

    def __init__(self, database: Path) -> None:
        """To be made when the connection has read: the log lies beside the file that a link leads to."""
        self._end = _ENOUGH
        self._file: int | None = None
        with suppress(OSError):
            self._file = os.open(f"{os.path.realpath(database)}-wal", os.O_RDWR | os.O_APPEND)
            self._end = os.lseek(self._file, 0, os.SEEK_END)

    def extend(self) -> None:
        """After a commit: make room for the next ones, if this one had none."""
        if self._file is None:
            return
        try:
            size = os.lseek(self._file, 0, os.SEEK_END)
            if size <= self._end < _ENOUGH:
                return
            if size < _ENOUGH and any(os.pread(self._file, _TAIL, size - _TAIL)):  # else another process did
                size += os.write(self._file, bytes(min(max(size, _LEAST), _MOST)))
            self._end = size
        except OSError:  # the disk is full; whoever writes next will say so
            self._end = _ENOUGH
        if self._end >= _ENOUGH:
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
