"""A bound on how long a look at the database waits, even where the server hangs.

A server that hangs keeps its connections: nothing comes, and nothing says that nothing will come. So at
the deadline the socket that the look waits at is shut down, wherever it waits, in the pool's own check
too. The pool then replaces the connection.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persistence.backends.postgres.connection import AsyncPoolConnection, PoolConnection


class Deadline:
    """Ends the wait of one look: shuts down the socket of the connection that it uses then."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.expired = False
        self._conn: PoolConnection | AsyncPoolConnection | None = None
        self._lock = threading.Lock()

    def watch(self, conn: PoolConnection | AsyncPoolConnection | None) -> None:
        """The look waits at this connection from now on, or at none."""
        with self._lock:
            self._conn = conn
            if self.expired:
                self._shut_down()

    def expire(self) -> None:
        """The time is up."""
        with self._lock:
            self.expired = True
            self._shut_down()

    def _shut_down(self) -> None:
        if self._conn is None or self._conn.closed:
            return
        # A socket object of our own on a copy of the descriptor: libpq goes on owning the original.
        with suppress(OSError), socket.socket(fileno=os.dup(self._conn.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)


DEADLINE: ContextVar[Deadline | None] = ContextVar("persistence_deadline", default=None)
"""What the pool's check of a connection is bounded by, in the thread or task that asks for one."""
