"""SQLite as a backend."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from persistence.backends.sqlite.connection import SqliteDatabase
from persistence.contract import AsyncBackend, Backend, Capability, Provider, Tables
from persistence.dsn import Dsn
from persistence.settings import Settings

if TYPE_CHECKING:
    from persistence.transfer.live import LiveSource
    from persistence.transfer.records import Sink, Source


class SqliteProvider(Provider):
    """``sqlite://``: a file, or a database in memory that this provider's openings share."""

    schemes = ("sqlite",)
    capabilities = frozenset(
        {
            Capability.DURABLE,
            Capability.STORE,
            Capability.TABLES,
            Capability.SOURCE,
            Capability.SINK,
            Capability.FOLLOW,
        }
    )

    def __init__(self, dsn: Dsn, settings: Settings) -> None:
        super().__init__(dsn, settings)
        self.database = SqliteDatabase(dsn, settings)

    def open(self) -> Backend:
        """Connect, so that a file that is no database is refused here."""
        from persistence.backends.sqlite.backend import SqliteBackend

        self.database.connect().close()
        self.database.hold()
        return SqliteBackend(self.database, self.settings)

    async def aopen(self) -> AsyncBackend:
        """As :meth:`open`."""
        from persistence.backends.sqlite.backend import AsyncSqliteBackend

        (await asyncio.to_thread(self.database.connect)).close()
        self.database.hold()
        return AsyncSqliteBackend(self.database, self.settings)

    def tables(self) -> AbstractContextManager[Tables]:
        """The administrator's view."""
        from persistence.backends.sqlite.tables import SqliteTables

        return SqliteTables(self)

    def source(self, *, allow_pickle: bool = False) -> AbstractContextManager[Source]:
        """One snapshot to read threads from."""
        from persistence.backends.sqlite.transfer import SqliteSource

        return SqliteSource(self, allow_pickle=allow_pickle)

    def sink(self) -> AbstractContextManager[Sink]:
        """The target of a transfer."""
        from persistence.backends.sqlite.transfer_sink import SqliteSink

        return SqliteSink(self)

    def live(self) -> AbstractContextManager[LiveSource]:
        """The file as a source that goes on changing."""
        from persistence.backends.sqlite.transfer_live import LiveFile

        return LiveFile(self)
