"""Postgres as a backend."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from persistence.backends.postgres.connection import aconnect, connect, make_async_pool, make_pool
from persistence.contract import AsyncBackend, Backend, Capability, Provider, Tables

if TYPE_CHECKING:
    from persistence.transfer.live import LiveSource
    from persistence.transfer.records import Sink, Source


class PostgresProvider(Provider):
    """``postgresql://``: a Postgres server, straight or behind PgBouncer."""

    schemes = ("postgresql",)
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

    def open(self) -> Backend:
        """Connect once, for a clear error where the server does not answer, then open the pool."""
        from persistence.backends.postgres.backend import PostgresBackend

        connect(self.dsn, self.settings).close()
        pool = make_pool(self.dsn, self.settings)
        pool.open()
        return PostgresBackend(pool, self.settings)

    async def aopen(self) -> AsyncBackend:
        """As :meth:`open`."""
        from persistence.backends.postgres.backend import AsyncPostgresBackend

        await (await aconnect(self.dsn, self.settings)).close()
        pool = make_async_pool(self.dsn, self.settings)
        await pool.open()
        return AsyncPostgresBackend(pool, self.settings)

    def tables(self) -> AbstractContextManager[Tables]:
        """The administrator's view."""
        from persistence.backends.postgres.tables import PostgresTables

        return PostgresTables(self)

    def source(self, *, allow_pickle: bool = False) -> AbstractContextManager[Source]:
        """One snapshot to read threads from."""
        from persistence.backends.postgres.transfer import PostgresSource

        return PostgresSource(self, allow_pickle=allow_pickle)

    def sink(self) -> AbstractContextManager[Sink]:
        """The target of a transfer."""
        from persistence.backends.postgres.transfer import PostgresSink

        return PostgresSink(self)

    def live(self) -> AbstractContextManager[LiveSource]:
        """The database as a source that goes on changing."""
        from persistence.backends.postgres.transfer_live import LiveDatabase

        return LiveDatabase(self)
