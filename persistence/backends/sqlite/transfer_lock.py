"""One transfer at a time into one SQLite file."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from persistence.errors import ConflictError, TransferError

_LOCK_WAIT = 10.0
"""Seconds to wait for another transfer."""
_LOCK_POLL = 0.1


@contextmanager
def sole_transfer(database: Path, label: str) -> Iterator[None]:
    """Hold a lock on an empty file beside the database, which goes with the lock.

    SQLite's own locks end with each batch's transaction. The kernel gives up this one with the process that
    holds it, however that ends; the file it may leave behind locks nobody out.

    Raises:
        ConflictError: Another transfer has it.
    """
    path = database.with_name(database.name + "-transfer")
    deadline = time.monotonic() + _LOCK_WAIT
    while (fd := _try(path, label)) is None:
        if time.monotonic() > deadline:
            raise ConflictError(
                f"another transfer into {label} is under way",
                hint="wait until it has ended, then run the command again",
            )
        time.sleep(_LOCK_POLL)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(fd)


def _try(path: Path, label: str) -> int | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise TransferError(f"cannot lock {label}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it before has deleted the file: another one of the name may be locked by now.
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None
